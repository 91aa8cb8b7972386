export type Role = 'reader' | 'writer';

export interface User {
  id: number;
  name: string;
  roles: Role[];
}

export function isWriter(user: User): boolean {
  return user.roles.includes('writer');
}
