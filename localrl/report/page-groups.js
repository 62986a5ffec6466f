// Shows the groups: the chosen one with its completions, and a table to choose from.
function openGroups() {
  let [groups, rows, filters] = [[], [], {}];
  const rewardsOf = (group) => group.leaves.map((leaf) => leaf.r).filter((r) => r !== null);
  const fate = (group) => (group.kept ? "learned from" : group.reason || "not learned from");
  const summary = (group) => {
    const rewards = rewardsOf(group);
    const prompt = group.messages.length ? group.messages[group.messages.length - 1].content : "";
    return {
      group,
      place: group.o,
      step: group.step,
      prompt: visible(prompt).replace(/\s+/g, " ").slice(0, 80),
      completions: group.leaves.length,
      reward: mean(rewards),
      lowest: rewards.length ? Math.min(...rewards) : null,
      highest: rewards.length ? Math.max(...rewards) : null,
      tokens: group.nodes.reduce((sum, node) => sum + node.n, 0),
      outcome: fate(group),
    };
  };
  const columns = ["step", "prompt", "completions", "reward", "lowest", "highest", "tokens", "outcome"];
  const wide = ["completions", "lowest", "highest", "tokens"];
  let [sort, up, shown, open] = ["step", false, [], null];
  const byPlace = (place) => groups.find((group) => group.o === place);

  const head = $("table").querySelector("thead tr");
  for (const name of columns) {
    const isText = ["step", "prompt", "outcome"].includes(name);
    const cell = make("th", undefined, kindOf(name, isText));
    const button = make("button", name);
    button.type = "button";
    button.addEventListener("click", () => {
      [up, sort] = [sort === name ? !up : true, name];
      list();
    });
    cell.append(button);
    head.append(cell);
  }
  $("filter").addEventListener("change", list);

  function kindOf(name, isText) {
    return (isText ? "" : "number ") + (wide.includes(name) ? "wide" : "");
  }

  function list() {
    const wanted = filters[$("filter").value] || filters.all;
    const order = (a, b) => {
      const [x, y] = [a[sort], b[sort]];
      if (x === y) return a.place - b.place;
      if (x === null || y === null) return x === null ? 1 : -1;
      return (x < y ? -1 : 1) * (up ? 1 : -1);
    };
    shown = rows.filter((row) => wanted(row.group)).sort(order);
    head.querySelectorAll("th").forEach((cell, i) => {
      cell.setAttribute("aria-sort", columns[i] !== sort ? "none" : up ? "ascending" : "descending");
    });
    $("table").querySelector("tbody").replaceChildren(...shown.map(line));
  }

  function line(row) {
    const tr = make("tr");
    tr.dataset.place = row.place;
    tr.classList.toggle("open", row.place === open);
    for (const name of columns) {
      const value = row[name];
      const isText = name === "step" || typeof value === "string";
      const cell = make("td", isText ? value : number(value), kindOf(name, isText));
      if (name === "step") {
        const button = make("button", value);
        button.type = "button";
        button.setAttribute("aria-label", `open the group of step ${value}: ${row.prompt}`);
        cell.replaceChildren(button);
      }
      tr.append(cell);
    }
    tr.addEventListener("click", () => choose(row.place));
    return tr;
  }

  function step(by) {
    const at = shown.findIndex((row) => row.place === open);
    const next = shown[Math.min(Math.max(at + by, 0), shown.length - 1)];
    if (next) choose(next.place);
  }
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-open]");
    if (!button) return;
    choose(Number(button.dataset.open));
    $("detail").scrollIntoView();
    $("detail").focus({ preventScroll: true });
  });

  // Shows a group because someone wants it, so that newer ones do not take its place.
  function choose(place) {
    if ($("follow")) $("follow").checked = false;
    show(place);
  }

  // Shows one group.

  const NAMES = { a: "advantage", e: "entropy", l: "surprisal" };
  const mode = () => document.querySelector("input[name=colour]:checked").value;
  for (const input of document.querySelectorAll("input[name=colour]")) {
    input.addEventListener("change", colour);
  }

  function value(node, i, key) {
    if (node.s && !node.s[i]) return null;
    return key === "a" ? node.a : node[key][i];
  }

  // Blue above 0 and orange below for advantages, purple for values that are never negative.
  function tint(v, most, key) {
    if (v === null || v === undefined || !most) return "transparent";
    const strength = 0.62 * Math.min(1, Math.abs(v) / most);
    if (key !== "a") return `rgba(170, 68, 153, ${strength})`;
    return v > 0 ? `rgba(0, 114, 178, ${strength})` : `rgba(213, 94, 0, ${strength})`;
  }

  function pathOf(group, leaf) {
    const path = [];
    for (let n = leaf.n; n >= 0 && !path.includes(n); n = group.nodes[n].p) path.unshift(n);
    return path;
  }

  function show(place) {
    open = place;
    const group = byPlace(place);
    for (const tr of $("table").querySelectorAll("tbody tr")) {
      tr.classList.toggle("open", Number(tr.dataset.place) === place);
    }
    reveal();
    const paths = group.leaves.map((leaf) => pathOf(group, leaf));
    const under = group.nodes.map((_, n) => paths.filter((path) => path.includes(n)).length);
    $("heading").textContent = `Step ${group.step}, ${visible(group.example)}`;
    $("fate").textContent =
      `${group.leaves.length} completions, ${fate(group)}.`;
    $("prompt").replaceChildren(
      ...group.messages.map((m) => make("pre", `${visible(m.role)}: ${visible(m.content)}`, "prompt")),
    );
    $("completions").replaceChildren(
      ...group.leaves.map((leaf, i) => completion(group, leaf, i, paths[i], under)),
    );
    $("tree").replaceChildren(...(isJoined(group) ? [tree(group, paths, under)] : []));
    colour();
  }

  // Scrolls only the table, not the page.
  function reveal() {
    const [row, box] = [$("table").querySelector("tr.open"), $("table").parentElement];
    if (row) box.scrollTop = row.offsetTop - box.clientHeight / 2;
  }

  function completion(group, leaf, i, path, under) {
    const box = make("article");
    box.append(make("h3", `${i + 1}: reward ${number(leaf.r)}`));
    const parts = Object.entries(leaf.q).map(([name, r]) => `${visible(name)} ${number(r)}`);
    const why = leaf.d ? `not learned from: ${leaf.d}` : "learned from";
    box.append(make("p", `${parts.join(", ")}; ended by ${leaf.f}; ${why}`, "quiet"));
    if (leaf.v !== undefined) box.append(make("pre", visible(leaf.v)));
    const tokens = make("div", undefined, "tokens");
    for (const n of path) {
      const node = group.nodes[n];
      (node.t || node.i.map((id) => `[${id}]`)).forEach((text, t) => {
        const span = make("span", visible(text));
        if (under[n] > 1) span.classList.add("shared");
        if (node.s && !node.s[t]) span.classList.add("heard");
        span.dataset.node = n;
        span.dataset.token = t;
        tokens.append(span);
      });
      if (node.n > node.e.length) tokens.append(` (${node.n - node.e.length} more tokens) `);
    }
    box.append(tokens);
    if (leaf.x) box.append(make("p", `logged: ${visible(leaf.x)}`, "quiet"));
    return box;
  }

  function tell(event) {
    const { node: n, token: t } = event.target.dataset;
    if (t === undefined) return;
    const node = byPlace(open).nodes[n];
    const told = Object.entries(NAMES).map(([key, name]) => `${name} ${number(value(node, t, key))}`);
    const heard = node.s && !node.s[t] ? ", not written by the model" : `, ${told.join(", ")} (nats)`;
    $("token").textContent = `token \u201c${event.target.textContent}\u201d${heard}`;
  }
  $("completions").addEventListener("pointerover", tell);
  $("completions").addEventListener("click", tell);

  function colour() {
    const [group, key] = [byPlace(open), mode()];
    const all = group.nodes.flatMap((node) => node.e.map((_, i) => value(node, i, key)));
    const most = Math.max(0, ...group.nodes.map((_, n) => strongest(group.nodes[n], key)));
    for (const span of $("completions").querySelectorAll("span[data-token]")) {
      const v = value(group.nodes[span.dataset.node], span.dataset.token, key);
      span.style.backgroundColor = tint(v, most, key);
    }
    for (const rect of $("tree").querySelectorAll("rect")) {
      const node = group.nodes[rect.dataset.node];
      const known = node.e.map((_, i) => value(node, i, key)).filter((v) => v !== null);
      rect.style.fill = tint(mean(known), most, key);
    }
    const range = { a: `blue above 0, orange below; strongest ${number(most)}` }[key];
    const forks = isForked(group) ? " Underlined tokens are shared by several completions." : "";
    const heard = group.nodes.some((node) => node.s) ? " Grey tokens are not the model's." : "";
    const none = all.length && !most ? ` It is 0 or unknown for every token here.` : "";
    $("scale").textContent =
      `Colour: ${NAMES[key]}, ${range || `the darker the higher; darkest ${number(most)} nats`}.` +
      none + forks + heard;
  }

  function strongest(node, key) {
    return node.e.reduce((most, _, i) => Math.max(most, Math.abs(value(node, i, key) || 0)), 0);
  }

  function listFilters() {
    filters = { "all": () => true };
    for (const why of new Set(groups.map(fate))) filters[why] = (group) => fate(group) === why;
    filters["rewards that differ"] = (group) => new Set(rewardsOf(group)).size > 1;
    if (groups.some(isForked)) filters["with forks"] = isForked;
    const chosen = $("filter").value;
    $("filter").replaceChildren(...Object.keys(filters).map((name) => new Option(name, name)));
    $("filter").value = chosen in filters ? chosen : "all";
  }

  // The last group whose rewards differ tells most; else the last one.
  function newest() {
    const telling = rows.filter((row) => row.lowest !== row.highest);
    const last = rows[rows.length - 1];
    const from = telling.filter((row) => !$("follow") || row.step === last.step);
    return (from.length ? from[from.length - 1] : last).place;
  }

  // Takes the groups of a page, and keeps the open one even if the new page has it no more.
  function update(found) {
    const kept = byPlace(open);
    groups = kept && !found.some((group) => group.o === open) ? [...found, kept] : found;
    groups.sort((a, b) => a.o - b.o);
    rows = groups.map(summary);
    $("explorer").hidden = !groups.length;
    if (!groups.length) return;
    listFilters();
    list();
    const following = $("follow") ? $("follow").checked : open === null;
    if (following && newest() !== open) show(newest());
    else reveal();
  }
  if ($("follow")) $("follow").addEventListener("change", () => $("follow").checked && show(newest()));

  return { update };
}
