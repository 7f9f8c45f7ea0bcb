"use strict";
// The table of modules: a tree in the model's order; a flat list of sites as soon as one filters or sorts.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const observed = facts.observed || {};
  const refused = new Set(facts.refusals.map((r) => r.path + " " + r.layer));
  const phase = (observed.shares || []).map((s) => s.phase)[0];
  const shares = new Map();
  for (const s of observed.shares || []) if (s.phase === phase) shares.set(s.path + "\n" + s.name, s.share);

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
    made.append(...children.filter((c) => c !== null && c !== undefined));
    return made;
  };
  const error = (e) => (e === null || e === undefined ? "" : typeof e === "string" ? e : e.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2"));
  const percent = (p) => (p === undefined ? "" : p < 0.0005 ? "<0.1%" : p >= 0.095 ? Math.round(p * 100) + "%" : (p * 100).toFixed(1) + "%");
  const spec = (i) => i.spec;

  // -- nodes: every module, and the functions that modules look up

  const nodes = [], byPath = new Map();
  const add = (path, label, parent, more) => {
    const node = { path, label, parent, depth: parent ? parent.depth + 1 : 0, children: [], order: nodes.length, outcome: null, open: false, ...more };
    if (parent) parent.children.push(node);
    nodes.push(node);
    return node;
  };
  const outcomes = new Map();
  facts.outcomes.forEach((outcome, index) => {
    if (!outcomes.has(outcome.path)) outcomes.set(outcome.path, []);
    outcomes.get(outcome.path).push({ ...outcome, index });
  });
  const listed = facts.modules.length ? facts.modules : [...outcomes.keys()].map((path) => ({ path, class: "", parameters: 0 }));
  for (const module of listed) {
    const parts = module.path.split(".");
    let parent = null;
    for (let n = parts.length - 1; n >= 0 && !parent && module.path; n--) parent = byPath.get(parts.slice(0, n).join(".")) || null;
    const known = parent ? (parent.path ? module.path.slice(parent.path.length + 1) : module.path) : module.path || facts.model.name || "the model";
    const node = add(module.path, module.path ? known : module.class || known, parent, { class: module.class, parameters: module.parameters, width: module.width });
    byPath.set(module.path, node);
    for (const outcome of outcomes.get(module.path) || []) {
      if (outcome.kind === "module") node.outcome = outcome;
      else add(module.path, outcome.name || outcome.layer, node, { class: outcome.kind, outcome });
    }
  }

  const choice = (o) => (o.swapped ? o[o.mode] : null);
  const state = (node) => {
    const o = node.outcome;
    if (!o) return "none";
    if (refused.has(o.path + " " + o.layer)) return "refused";
    const now = choice(o);
    return now && now.implementation ? "kernel" : "original";
  };
  const serving = (node) => {
    const now = node.outcome && choice(node.outcome);
    return now && now.implementation ? spec(now.implementation) : "original";
  };
  const verdict = (node) => (node.outcome && choice(node.outcome) ? choice(node.outcome).verdict : null);
  const reason = (node) => {
    const o = node.outcome;
    if (!o) return "";
    if (!o.swapped) return o.reason;
    const now = choice(o);
    return now.verdict ? now.verdict.reason : now.passed.map((p) => p.spec + ": " + p.why).join("; ");
  };
  const ratio = (node) => {
    const v = verdict(node);
    return v && v.error_kernel !== null && v.error_original ? v.error_kernel / v.error_original : undefined;
  };
  const shareOf = (node) => shares.get(node.path + "\n" + ((node.outcome && node.outcome.name) || ""));
  const faster = (node) => {
    const o = node.outcome;
    if (!o || state(node) !== "kernel") return undefined;
    const target = o.target.split(".").pop();
    const found = (observed.speeds || []).filter((s) => s.layer === o.layer && s.original === target && (s.shape === phase || !phase));
    const mine = found.length === 1 ? found : found.filter((s) => s.width === node.width);
    return mine.length === 1 ? mine[0].speedup : undefined;
  };

  const columns = [
    { name: "Module", key: (n) => n.order },
    { name: "Served by", key: (n) => serving(n) },
    { name: "Error", key: (n) => (verdict(n) ? verdict(n).error_kernel : undefined), text: (n) => error(verdict(n) && verdict(n).error_kernel) },
    { name: "vs original", key: ratio, text: (n) => (ratio(n) === undefined ? "" : (ratio(n) < 1000 ? ratio(n).toFixed(2) : ratio(n).toExponential(1)) + "x") },
  ];
  if (observed.speeds && observed.speeds.length) columns.push({ name: "Faster", key: faster, text: (n) => (faster(n) ? faster(n).toFixed(2) + "x" : "") });
  if (phase) columns.push({ name: "Share of " + phase, key: shareOf, text: (n) => percent(shareOf(n)) });
  if (facts.calls) columns.push({ name: "Calls", key: (n) => (n.outcome ? facts.calls[n.path] : undefined), text: (n) => (n.outcome && facts.calls[n.path] ? String(facts.calls[n.path]) : "") });

  // -- what is shown

  const view = { words: [], only: "all", sort: 0, down: false, wide: new Set() };
  const matches = (node) => {
    if (view.only !== "all" && state(node) !== view.only) return false;
    const text = [node.path, node.label, node.class, serving(node), reason(node), node.outcome ? node.outcome.layer : ""].join(" ").toLowerCase();
    return view.words.every((w) => text.includes(w));
  };
  const visible = () => {
    const flat = view.words.length || view.only !== "all" || view.sort || view.down;
    if (!flat) {
      const found = [];
      const walk = (node) => { found.push(node); if (node.open) node.children.forEach(walk); };
      nodes.filter((n) => !n.parent).forEach(walk);
      return [found, false];
    }
    const found = nodes.filter((n) => (n.outcome || view.words.length) && matches(n));
    const key = columns[view.sort].key, sign = view.down ? -1 : 1;
    found.sort((a, b) => {
      const x = key(a), y = key(b), none = (v) => v === undefined || v === null;
      if (none(x) || none(y)) return none(x) - none(y) || a.order - b.order; // what has no value comes last, either way
      return (x < y ? -1 : x > y ? 1 : 0) * sign || a.order - b.order;
    });
    return [found, true];
  };
  const below = (node) => {
    const sum = { kernel: 0, original: 0, refused: 0 };
    const walk = (n) => { if (n.outcome) sum[state(n)]++; n.children.forEach(walk); };
    node.children.forEach(walk);
    return Object.entries(sum).filter(([, n]) => n).map(([what, n]) => n + " " + what + (n > 1 && what !== "refused" ? "s" : "")).join(", ");
  };

  // -- drawing

  const body = document.querySelector(".tree tbody"), head = document.querySelector(".tree thead"), shown = document.getElementById("shown");

  const draw = () => {
    const [found, flat] = visible();
    body.replaceChildren(...found.flatMap((node) => {
      const row = line(node, flat);
      return view.wide.has(node) ? [row, more(node)] : [row];
    }));
    if (!found.length) body.append(element("tr", { class: "more" }, element("td", { colspan: columns.length }, "Nothing matches.")));
    const sites = facts.outcomes.length;
    shown.textContent = flat ? found.length + (found.length === 1 ? " row" : " rows") + " of " + nodes.length : nodes.length + " modules and functions, " + sites + " of them sites. Open one for its reasons and verdicts.";
    head.replaceChildren(element("tr", {}, ...columns.map((column, i) => {
      const sorted = view.sort === i && (i || view.down);
      const button = element("button", { type: "button" }, column.name);
      button.addEventListener("click", () => {
        if (view.sort === i) view.down = !view.down;
        else [view.sort, view.down] = [i, i > 1];
        draw();
      });
      return element("th", { scope: "col", class: i > 1 ? "n" : null, "aria-sort": sorted ? (view.down ? "descending" : "ascending") : null }, button);
    })));
  };

  const line = (node, flat) => {
    const what = state(node), foldable = !flat && node.children.length;
    const name = element("td", { class: "name", style: flat ? null : "--depth:" + node.depth });
    if (foldable) {
      const fold = element("button", { type: "button", "aria-expanded": String(node.open), "aria-label": (node.open ? "Close " : "Open ") + node.label }, "\u203a");
      fold.addEventListener("click", (event) => { event.stopPropagation(); node.open = !node.open; draw(); });
      name.append(fold);
    } else if (!flat) name.append(element("span", { class: "pad" }));
    const full = node.path === "" ? node.label : node.class === "function" ? node.path + " \u00b7 " + node.label : node.path;
    if (flat) name.append(full);
    else name.append(element("span", { class: "label" }, ...name.childNodes, node.label));
    name.append(element("span", { class: "class" }, node.class && node.class !== node.label ? node.class : ""));
    const by = element("td", { class: "by" });
    if (what !== "none") by.append(element("span", { class: "tag " + what }, what === "refused" ? "refused" : serving(node)));
    else if (foldable && !node.open && below(node)) by.append(element("span", { class: "sum" }, below(node)));
    const row = element("tr", { "data-order": node.order, "data-state": what }, name, by, ...columns.slice(2).map((c) => element("td", { class: "n", "data-label": c.name }, c.text(node))));
    row.addEventListener("click", () => {
      if (node.outcome) view.wide.has(node) ? view.wide.delete(node) : view.wide.add(node);
      else if (foldable) node.open = !node.open;
      draw();
    });
    if (node.outcome) {
      row.tabIndex = 0;
      row.setAttribute("aria-expanded", String(view.wide.has(node)));
      row.addEventListener("keydown", (event) => {
        if (event.target !== row || (event.key !== "Enter" && event.key !== " ")) return;
        event.preventDefault();
        view.wide.has(node) ? view.wide.delete(node) : view.wide.add(node);
        draw();
        body.querySelector('tr[data-order="' + node.order + '"]').focus();
      });
    }
    return row;
  };

  const list = (pairs) => element("dl", {}, ...pairs.filter(([, v]) => v !== null && v !== undefined && v !== "").flatMap(([k, v]) => [element("dt", {}, k), element("dd", {}, v)]));

  // Of what a verdict holds for, the rest stands in the lines around it.
  const said = new Set(["kernel", "build", "digest", "original", "layer", "dtype", "mode", "machine"]);
  const side = (title, c) => {
    const i = c.implementation, v = c.verdict;
    return element("div", {}, element("h4", {}, title), list([
      ["served by", i ? spec(i) : "the original"],
      ["build", i ? i.variant : null],
      ["chosen as", c.why],
      ["from", i ? i.source + ", commit " + i.commit.slice(0, 12) : null],
      ["digest", i ? element("code", { title: i.digest }, i.digest.slice(0, 12)) : null],
      [v && v.accepted ? "checked" : "refused", v ? v.reason : null],
      ["error", v && v.error_kernel !== null && !v.reason.includes("error") ? error(v.error_kernel) + ", original " + error(v.error_original) : null],
      ...(c.measured || []).map((m) => ["on " + m.size, (m.serves || "the original") + (m.speedup ? ", " + m.speedup.toFixed(2) + "x" : ", not measured")]),
      ...(v ? Object.entries(v.details).filter(([name]) => !said.has(name)) : []),
      ["verdict", v && v.key ? element("code", { title: v.key }, v.key.slice(0, 12)) : null],
      ...c.passed.map((p) => ["passed over", p.spec + ": " + p.why]),
      ...(c.not_tried || []).map((spec) => ["not tried", spec]),
      ...((i && i.other_builds) || []).map((b) => ["not taken", b.variant + ": " + b.why]),
    ]));
  };

  const more = (node) => {
    const o = node.outcome, cell = element("td", { colspan: columns.length });
    cell.append(element("p", { class: "dim" }, [o.path || "the model itself", o.layer, o.target, o.dtype.replace("torch.", "") + " on " + o.device].join(" \u00b7 ")));
    const why = facts.refusals.filter((r) => r.path === o.path && r.layer === o.layer).map((r) => r.reason);
    for (const text of new Set(why)) cell.append(element("p", {}, "Refused: " + text));
    if (!o.swapped) {
      if (!why.length) cell.append(element("p", {}, "The original stays: " + o.reason));
      if (o.passed.length) cell.append(list(o.passed.map((p) => ["passed over", p.spec + ": " + p.why])));
    } else cell.append(element("div", { class: "sides" }, side("inference", o.inference), side("training", o.training)));
    return element("tr", { class: "more" }, cell);
  };

  // -- what one can do

  const find = document.getElementById("find");
  find.addEventListener("input", () => { view.words = find.value.toLowerCase().split(/\s+/).filter(Boolean); draw(); });
  const chips = document.querySelector(".chips");
  for (const what of ["all", "kernel", "original", "refused"]) {
    const n = nodes.filter((node) => state(node) === what).length;
    if (what !== "all" && !n) continue;
    const chip = element("button", { type: "button", "aria-pressed": String(what === "all"), "data-only": what }, what === "all" ? "tree" : what + " " + n);
    chip.addEventListener("click", () => {
      view.only = what;
      if (what === "all") { [view.sort, view.down, view.words, find.value] = [0, false, [], ""]; }
      for (const other of chips.children) other.setAttribute("aria-pressed", String(other === chip));
      draw();
    });
    chips.append(chip);
  }
  for (const dot of document.querySelectorAll("[data-site]")) {
    const index = Number(dot.dataset.site), node = nodes.find((n) => n.outcome && n.outcome.index === index);
    if (!node) continue;
    const title = document.createElementNS(dot.namespaceURI, "title");
    title.textContent = [node.path, serving(node), reason(node)].join("\n");
    dot.prepend(title);
    dot.addEventListener("click", () => {
      for (let up = node.parent; up; up = up.parent) up.open = true;
      [view.only, view.words, view.sort, view.down, find.value] = ["all", [], 0, false, ""];
      for (const chip of chips.children) chip.setAttribute("aria-pressed", String(chip.dataset.only === "all"));
      view.wide.add(node);
      draw();
      const row = body.querySelector('tr[data-order="' + node.order + '"]');
      row.classList.add("flash");
      row.scrollIntoView({ block: "center" });
      row.focus({ preventScroll: true });
    });
  }
  document.getElementById("save").href = URL.createObjectURL(new Blob([JSON.stringify(facts, null, 2)], { type: "application/json" }));

  // The way down to where the model branches is open, and the first branch with a site.
  for (let node = nodes[0]; node; ) {
    node.open = true;
    const inner = node.children.filter((c) => c.children.length);
    node = inner.length === 1 || inner.every((c) => /^\d+$/.test(c.label)) ? inner[0] : inner.find((c) => below(c));
    if (node && node.depth > 6) break;
  }
  draw();
})();
