import { Client } from './client';

it('throws when no attempt succeeds', async () => {
  const client = new Client({ baseUrl: 'https://example.org', retries: 0 });
  await expect(client.user(1)).rejects.toThrow('cannot be read');
});
