export const render = (root, state) => {
  const element = <p className="count">{state.count}</p>;
  root.replaceChildren(element);
};
