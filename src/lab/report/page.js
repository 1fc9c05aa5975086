"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, settings = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), settings);
    element.append(...children);
    return element;
  };
  const root = document.documentElement;

  // Light and dark. A page opened as a file may have no storage.
  const stored = () => { try { return localStorage.getItem("hra-theme"); } catch { return null; } };
  const store = (theme) => { try { localStorage.setItem("hra-theme", theme); } catch { /* kept for this visit only */ } };
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    store(root.dataset.theme);
  });

  // Tables that sort; rows without a value stay last.
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
      const opposite = { ascending: "descending", descending: "ascending" };
      const order = opposite[heading.getAttribute("aria-sort")] || heading.dataset.first;
      headings.forEach((other) => other.setAttribute("aria-sort", other === heading ? order : "none"));
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        if (value(a) === undefined || value(b) === undefined) {
          return (value(a) === undefined) - (value(b) === undefined);
        }
        return (order === "ascending" ? 1 : -1) * compare(value(a), value(b));
      });
      table.tBodies[0].append(...rows);
    }));
  }

  // Tables with more to the right say so, until one has scrolled there.
  for (const wide of document.querySelectorAll(".wide")) {
    const box = wide.querySelector(".scroll");
    const look = () => {
      const more = box.scrollWidth - box.clientWidth - box.scrollLeft > 2;
      wide.querySelector(".more").hidden = !more;
      wide.classList.toggle("on", more);
      wide.style.setProperty("--tall", `${box.offsetHeight}px`);
    };
    box.addEventListener("scroll", look, { passive: true });
    // What is in it changes with the choices, and its width with the window's.
    new ResizeObserver(look).observe(box);
    new MutationObserver(look).observe(box, { childList: true });
    look();
  }

  // The grid of pictures. A subject's data is read when it is first chosen.
  const common = JSON.parse(byId("common").textContent);
  const subjects = new Map();
  const cellsOf = (number) => {
    if (!subjects.has(number)) subjects.set(number, JSON.parse(byId(`subject-${number}`).textContent));
    return subjects.get(number);
  };
  const choice = (id) => byId(id).value;
  const offer = (id, options, chosen) => {
    const select = byId(id);
    select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
    if (options.some(([value]) => String(value) === String(chosen))) select.value = chosen;
    select.parentElement.hidden = options.length < 2;
  };

  // What the large view walks over: rows of pictures with their settings.
  let own = [];
  let grid = [];
  const thumbnail = (walk, row, column) => {
    const picture = walk()[row][column];
    const image = make("img", { loading: "lazy", decoding: "async", alt: picture.alt });
    image.src = picture.address;
    const button = make("button", { type: "button", className: "thumbnail", title: picture.hint }, image);
    image.addEventListener("error", () => button.classList.add("gone"));
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 128));
    button.addEventListener("click", () => open(walk(), row, column));
    return button;
  };

  const showOwn = () => {
    const subject = common.subjects[choice("subject")];
    const kinds = subject.pictures.filter(([, addresses]) => addresses.length);
    own = kinds.map(([kind, addresses]) => addresses.map((address, i) => ({
      address,
      alt: `${subject.name}, ${kind} picture ${i + 1}`,
      hint: `${kind} ${i + 1}`,
      prompt: kind === "trained on" ? subject.trained : "",
      facts: [["subject", subject.name], ["picture", `${kind} ${i + 1}`]],
    })));
    byId("own").replaceChildren(...kinds.map(([kind, addresses], row) => make("figure", {},
      make("figcaption", { textContent: kind }),
      make("div", {}, ...addresses.map((_, i) => thumbnail(() => own, row, i))))));
  };

  const columnsShown = () => {
    const cells = cellsOf(choice("subject"));
    const of = choice("rates-of");
    const base = cells.filter((cell) => cell.method === null);
    const trained = cells.filter((cell) => cell.method !== null && cell.seed === choice("seed")
      && (of === "" ? cell.chosen : cell.method === Number(of)));
    const label = (cell) => {
      const twins = trained.filter((other) => other.method === cell.method).length > 1;
      return common.methods[cell.method] + (twins ? ` ${cell.rate}` : "");
    };
    // A cell that is not there yet keeps its column.
    common.methods.forEach((_, method) => {
      if (of === "" && !trained.some((cell) => cell.method === method)) trained.push({ method, rate: null, evaluations: [] });
    });
    trained.sort((a, b) => a.method - b.method || a.rate - b.rate);
    return [...base.map((cell) => ({ cell, label: "base" })), ...trained.map((cell) => ({ cell, label: label(cell) }))];
  };

  const promptsOf = ({ cell }) => {
    const drift = choice("set") === "drift";
    if (choice("step") === "" && cell.steps && choice("set") === common.set) {
      const drawn = (step) => cell.evaluations.find((e) => e.set === common.set && e.step === step);
      return { steps: cell.steps, prompts: cell.steps.map((step, row) => drawn(step).prompts[row]) };
    }
    const wanted = Number(choice("step") || common.steps[common.steps.length - 1]);
    const scale = Number(choice("scale"));
    const steps = cell.evaluations.filter((e) => (drift ? e.drift.length : e.set === choice("set"))
      && (cell.method === null || (e.step === wanted && e.scale === scale)));
    const last = steps[steps.length - 1];
    const prompts = !last ? [] : drift ? last.drift : last.prompts;
    return { steps: prompts.map(() => last.step), prompts };
  };

  const scoreFacts = (scores, own) => common.columns.flatMap((column, i) => {
    const value = own[i] ?? scores[i];
    return value === undefined || value === null ? [] : [[column.title, value.toFixed(column.digits)]];
  });

  // What a pair was drawn from: the condition that was shown, its own or another pair's, and its picture.
  const givenPictures = (pairs, row, number, prompt) => {
    const shown = number > 0 ? pairs.shuffled[row] : row;
    const entry = (what, address, scores) => {
      const facts = scoreFacts(scores, []);
      const hint = facts.map(([title, value]) => `${title} ${value}`).join(", ");
      return { address, alt: `${what}: ${prompt}`, hint, prompt, facts: [["pair", row + 1], ...facts] };
    };
    const condition = shown === row ? "condition" : `condition of pair ${shown + 1}`;
    return [entry(condition, pairs.conditions[shown], []), entry("real", pairs.pictures[row], pairs.scores[row] ?? [])];
  };

  const showGrid = () => {
    const columns = columnsShown();
    const drawn = columns.map(promptsOf);
    const rows = Math.max(0, ...drawn.map((d) => d.prompts.length));
    const pictures = Math.max(1, ...drawn.flatMap((d) => d.prompts.map((prompt) => prompt[2].length)));
    const before = choice("picture");
    const pairs = common.subjects[choice("subject")].pairs?.[choice("set")];
    const ways = ["its condition", "another's condition"];
    offer("picture", Array.from({ length: pictures }, (_, i) => [i, pairs ? ways[i] : String(i + 1)]), before);
    const number = Number(choice("picture"));
    const texts = Array.from({ length: rows }, (_, row) => drawn.map((d) => d.prompts[row]).find(Boolean)[0]);
    grid = texts.map((text, row) => columns.map(({ cell, label }, column) => {
      const prompt = drawn[column].prompts[row];
      // The base model sees no condition: its one picture stands beside both.
      const own = pairs && cell.method === null ? 0 : number;
      const picture = prompt && prompt[2][own];
      if (!picture) return null;
      const facts = [["method", label], ["subject", common.subjects[choice("subject")].name]];
      if (cell.rate !== null) facts.push(["learning rate", cell.rate], ["step", drawn[column].steps[row]], ["training seed", cell.seed]);
      if (cell.rate !== null && common.scales.length > 1) facts.push(["adapter scale", choice("scale")]);
      facts.push(["picture", `${pairs ? row + 1 : number + 1}, seed ${picture[1]}`], ...scoreFacts(picture[2], prompt[1]));
      const hint = scoreFacts(picture[2], []).map(([title, value]) => `${title} ${value}`).join(", ");
      return { address: cell.folder + picture[0], alt: `${label}: ${prompt[0]}`, hint, prompt: prompt[0], facts };
    }));
    if (pairs) grid = grid.map((row, r) => [...givenPictures(pairs, r, number, texts[r]), ...row]);
    const given = pairs ? ["condition", "real"] : [];
    const head = make("tr", {}, make("th", { scope: "col", textContent: pairs ? "caption" : "prompt" }),
      ...[...given, ...columns.map(({ label }) => label)].map((label) => make("th", { scope: "col", textContent: label })));
    const body = grid.map((row, r) => make("tr", {}, make("th", { scope: "row", textContent: texts[r] }),
      ...row.map((picture, c) => make("td", {}, picture ? thumbnail(() => grid, r, c) : "\u2013"))));
    const nothing = make("p", { textContent: "Nothing was drawn for this choice." });
    byId("grid").replaceChildren(rows ? make("table", { className: "grid" }, make("thead", {}, head), make("tbody", {}, ...body)) : nothing);
  };

  const showSubject = () => {
    const several = new Set(cellsOf(choice("subject")).filter((cell) => cell.method !== null && !cell.chosen).map((cell) => cell.method));
    offer("rates-of", [["", "of the table"], ...[...several].sort((a, b) => a - b).map((m) => [m, `all of ${common.methods[m]}`])], choice("rates-of"));
    showOwn();
    showGrid();
  };

  if (common.subjects.length) {
    offer("subject", common.subjects.map((subject, i) => [i, subject.name]));
    offer("seed", common.seeds.map((seed) => [seed, seed]));
    const steps = common.steps.map((step) => [step, String(step)]);
    offer("step", common.paper ? [...steps, ["", "as scored"]] : steps, common.paper ? "" : common.steps[common.steps.length - 1]);
    offer("scale", common.scales.map((scale) => [scale, String(scale)]), 1);
    const sets = common.sets.map((set) => [set, set]);
    offer("set", common.drift ? [...sets, ["drift", "unrelated"]] : sets, common.set);
    byId("subject").addEventListener("change", showSubject);
    for (const id of ["seed", "picture", "step", "scale", "set", "rates-of"]) byId(id).addEventListener("change", showGrid);
    showSubject();
  } else {
    byId("pictures").hidden = true;
  }

  // The large view.
  const dialog = byId("large");
  let walk = [];
  let at = [0, 0];
  const show = () => {
    const picture = walk[at[0]][at[1]];
    const image = dialog.querySelector("img");
    image.alt = picture.alt;
    image.src = picture.address;
    dialog.querySelector(".prompt").textContent = picture.prompt;
    dialog.querySelector("dl").replaceChildren(...picture.facts.flatMap(([title, value]) => [
      make("dt", { textContent: title }), make("dd", { textContent: value })]));
  };
  dialog.querySelector("img").addEventListener("load", ({ target }) => target.classList.toggle("small", target.naturalWidth < 200));
  const open = (pictures, row, column) => {
    walk = pictures;
    at = [row, column];
    show();
    dialog.showModal();
  };
  // A point of a curve opens the first picture that was drawn there.
  for (const mark of document.querySelectorAll("[data-opens]")) {
    const go = () => {
      const [method, rate, step, scale] = mark.dataset.opens.split(",");
      for (const [id, value] of [["step", step], ["scale", scale], ["set", common.set], ["rates-of", ""]]) byId(id).value = value;
      showGrid();
      const column = columnsShown().findIndex(({ cell }) => cell.method === Number(method) && cell.rate === rate);
      const row = grid.findIndex((pictures) => pictures[column]);
      byId("grid").scrollIntoView({ block: "nearest" });
      if (row >= 0) open(grid, row, column);
    };
    mark.addEventListener("click", go);
    mark.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      go();
    });
  }
  const moves = { left: [0, -1], right: [0, 1], up: [-1, 0], down: [1, 0] };
  const move = (where) => {
    if (where === "close") return dialog.close();
    let [row, column] = at;
    do {
      row += moves[where][0];
      column += moves[where][1];
    } while (walk[row] && column >= 0 && column < walk[row].length && !walk[row][column]);
    if (walk[row] && walk[row][column]) {
      at = [row, column];
      show();
    }
  };
  dialog.addEventListener("click", ({ target }) => {
    const button = target.closest("[data-move]");
    if (button) move(button.dataset.move);
    else if (target === dialog) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    const where = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" }[event.key];
    if (where) {
      event.preventDefault();
      move(where);
    }
  });
})();
