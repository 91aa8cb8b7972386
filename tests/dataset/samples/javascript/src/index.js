import { createStore } from './store.js';
import { render } from './view';

const store = createStore({ count: 0 });

store.subscribe((state) => render(document.body, state));

export async function loadHelp() {
  const help = await import('./help/index.js');
  return help.default;
}
