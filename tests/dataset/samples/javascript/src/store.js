const { freeze } = require('./util');

/** Create a store that tells listeners of changes. */
export function createStore(initial) {
  let state = freeze(initial);
  const listeners = new Set();

  function subscribe(listener) {
    listeners.add(listener);
    listener(state);
    return () => listeners.delete(listener);
  }

  function update(change) {
    if (typeof change === 'function') {
      state = freeze({ ...state, ...change(state) });
    } else {
      state = freeze({ ...state, ...change });
    }
    for (const listener of listeners) {
      listener(state);
    }
  }

  return { subscribe, update };
}
