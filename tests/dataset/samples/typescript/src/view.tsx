import { Client } from './api/client';
import { isWriter, type User } from './models/user';

export const Name = ({ user }: { user: User }) => (
  <span className={isWriter(user) ? 'writer' : 'reader'}>{user.name}</span>
);

export async function load(id: number) {
  const client = new Client({ baseUrl: 'https://example.org' });
  return client.user(id);
}
