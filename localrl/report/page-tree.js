// Draws a tree: time runs to the right, one row for each completion, a bar for each node.
function tree(group, paths, under) {
  const width = Math.max(300, $("tree").clientWidth);
  const [row, left, right] = [24, 14, 74];
  const begin = [];
  group.nodes.forEach((node, n) => {
    begin[n] = node.p < 0 ? 0 : begin[node.p] + group.nodes[node.p].n;
  });
  const longest = Math.max(1, ...group.nodes.map((node, n) => begin[n] + node.n));
  const x = (tokens) => left + ((width - left - right) * tokens) / longest;
  const order = group.leaves.map((_, i) => i).sort((a, b) => compare(paths[a], paths[b]));
  const height = (n) => mean(order.flatMap((i, at) => (paths[i].includes(n) ? [at] : []))) * row + 16;
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${order.length * row + 8}`,
    role: "img",
    "aria-label": `a tree of ${group.leaves.length} completions`,
  });
  const bars = [];
  group.nodes.forEach((node, n) => {
    if (!under[n]) return;
    const y = height(n);
    const from = node.p < 0 ? [4, ((order.length - 1) * row) / 2 + 16] : [x(begin[n]), height(node.p)];
    svg.append(shape("path", { d: `M${from[0]},${from[1]} L${node.p < 0 ? 4 : from[0]},${y} H${x(begin[n])}` }));
    const bar = shape("rect", {
      x: x(begin[n]) + 1,
      y: y - 6,
      width: Math.max(2, x(begin[n] + node.n) - x(begin[n]) - 2),
      height: 12,
      rx: 3,
    });
    bar.dataset.node = n;
    bar.append(shape("title", {}, `${node.n} tokens, advantage ${number(node.a)}, on ${under[n]} completions`));
    bar.addEventListener("click", () => pick(n));
    bars.push(bar);
  });
  svg.append(...bars);
  order.forEach((i, at) => {
    const leaf = group.leaves[i];
    const end = x(begin[leaf.n] + group.nodes[leaf.n].n) + 6;
    svg.append(shape("text", { x: end, y: at * row + 20 }, `${i + 1}: ${number(leaf.r)}`));
  });
  return svg;
}

// Orders completions by a walk through the tree, so that no lines cross.
function compare(a, b) {
  for (let i = 0; i < Math.min(a.length, b.length); i++) if (a[i] !== b[i]) return a[i] - b[i];
  return a.length - b.length;
}

function pick(n) {
  for (const marked of $("detail").querySelectorAll("[data-node]")) {
    marked.classList.toggle("picked", Number(marked.dataset.node) === n);
  }
}

// Returns true if some node follows another.
function isJoined(group) {
  return group.nodes.some((node) => node.p >= 0);
}

// Returns true if several nodes follow the same one.
function isForked(group) {
  const parents = group.nodes.map((node) => node.p).filter((p) => p >= 0);
  return new Set(parents).size < parents.length;
}
