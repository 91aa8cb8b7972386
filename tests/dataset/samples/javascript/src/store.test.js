import { createStore } from './store';

test('a listener is told the first state', () => {
  const seen = [];
  createStore({ count: 1 }).subscribe((state) => seen.push(state.count));
  expect(seen).toEqual([1]);
});
