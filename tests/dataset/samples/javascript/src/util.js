function freeze(value) {
  return Object.freeze({ ...value });
}

module.exports = { freeze };
