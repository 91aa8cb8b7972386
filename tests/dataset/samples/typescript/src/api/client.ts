import type { User } from '../models/user';
import { parse } from '../util.js';

export interface ClientOptions {
  baseUrl: string;
  retries?: number;
}

export class Client {
  constructor(private readonly options: ClientOptions) {}

  async user(id: number): Promise<User> {
    const attempts = this.options.retries ?? 3;
    for (let attempt = 0; attempt < attempts; attempt += 1) {
      const response = await fetch(`${this.options.baseUrl}/users/${id}`);
      if (response.ok) {
        return parse<User>(await response.text());
      }
    }
    throw new Error(`user ${id} cannot be read`);
  }
}
