// Building and updating the document. All text goes through textContent: names, labels and URLs are
// the users'.

export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// The document is only touched where something changed, so that updates cost no layout.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

export function setAttribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// The children of `parent`, one for each item, kept from one time to the next by their key.
export class List {
  constructor(parent, keyOf, create, update) {
    this.parent = parent;
    this.keyOf = keyOf;
    this.create = create;
    this.update = update;
    this.nodes = new Map();
    this.order = [];
  }

  show(items) {
    const seen = new Set();
    const order = [];
    for (const item of items) {
      const key = this.keyOf(item);
      if (seen.has(key)) continue;
      seen.add(key);
      let node = this.nodes.get(key);
      if (node === undefined) {
        node = this.create(item);
        this.nodes.set(key, node);
      }
      this.update(node, item);
      order.push(node);
    }
    for (const [key, node] of this.nodes) {
      if (!seen.has(key)) {
        node.remove();
        this.nodes.delete(key);
      }
    }
    if (order.length !== this.order.length || order.some((node, at) => node !== this.order[at])) {
      this.parent.append(...order);
      this.order = order;
    }
  }
}

// A bar of `done` out of `total`, with a name for those who cannot see it.
export function progressBar(name) {
  const inner = element("div");
  return element("div", { class: "progress", role: "progressbar", "aria-label": name }, inner);
}

export function setProgress(bar, done, total) {
  const part = total > 0 ? Math.min(1, done / total) : 0;
  const percent = `${(100 * part).toFixed(1)}%`;
  if (bar.firstChild.style.width !== percent) bar.firstChild.style.width = percent;
  setAttribute(bar, "aria-valuenow", String(Math.round(100 * part)));
}
