"use strict";
// Without this script the page shows everything. With it, a reader sorts and filters rows, and chooses curves.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
document.documentElement.classList.add("scripted");

for (const part of all("[data-part]")) {
  const filter = part.querySelector("[data-filter]");
  const chips = all("[data-toggle]", part);
  const table = part.querySelector("[data-sortable]");
  if (!table) continue;

  const show = () => {
    const words = filter.value.trim().toLowerCase();
    const names = new Set();
    for (const row of all("tbody tr", table)) {
      const text = `${row.dataset.row} ${row.dataset.words}`.toLowerCase();
      const chip = chips.find((each) => each.dataset.toggle === row.dataset.row);
      if (text.includes(words) && chip.getAttribute("aria-pressed") === "true") names.add(row.dataset.row);
    }
    for (const item of all("[data-row]", part)) item.classList.toggle("off", !names.has(item.dataset.row));
    for (const tracks of all("table.tracks, table.pairs", part)) {
      const heads = [...tracks.tHead.rows[0].cells];
      for (const row of all("tbody tr", tracks))
        heads.forEach((head, place) => row.cells[place]?.classList.toggle("off", head.classList.contains("off")));
    }
    part.querySelector("[data-count]").textContent =
      names.size === chips.length ? "" : `${names.size} of ${chips.length} rows shown below. The text above is about all rows.`;
  };
  filter.addEventListener("input", show);
  for (const chip of chips)
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
      show();
    });

  const columns = part.querySelector("[data-columns]");
  columns.addEventListener("click", () => {
    const on = table.classList.toggle("whole");
    columns.setAttribute("aria-pressed", String(on));
  });

  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const label = head.firstElementChild;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label.textContent;
    button.title = label.title;
    label.replaceWith(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[place].dataset.value;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [first, second] = [value(a), value(b)];
        if (first === "" || second === "") return (first === "") - (second === "");
        const numbers = Number(first) - Number(second);
        return sign * (Number.isNaN(numbers) ? first.localeCompare(second) : numbers);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

for (const choice of all("[data-choice]")) {
  const select = choice.querySelector("[data-select]");
  if (!select) continue;
  const figures = all("figure[data-term]", choice);
  const choose = () => {
    for (const figure of figures) figure.hidden = select.value !== "" && figure.dataset.term !== select.value;
    choice.classList.toggle("single", select.value !== "");
  };
  select.addEventListener("change", choose);
  if (select.value === "" && matchMedia("(max-width: 40rem)").matches) select.selectedIndex = 1;
  choose();
}

for (const button of all("[data-more]")) {
  const more = button.previousElementSibling.querySelector(".more");
  const label = button.textContent;
  const show = (on) => {
    more.hidden = !on;
    button.setAttribute("aria-expanded", String(on));
    button.textContent = on ? "Show fewer" : label;
  };
  button.addEventListener("click", () => show(more.hidden));
  show(false);
}

for (const button of all("[data-copy]"))
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
      getSelection().removeAllRanges();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });

const zoomed = document.createElement("dialog");
zoomed.className = "zoomed";
zoomed.addEventListener("click", () => zoomed.close());
document.body.append(zoomed);
for (const button of all(".zoom"))
  button.addEventListener("click", () => {
    const text = document.createElement("p");
    text.textContent = button.parentElement.querySelector("figcaption").textContent.trim();
    zoomed.replaceChildren(button.querySelector("img").cloneNode(), text);
    zoomed.showModal();
  });

const themes = ["system", "light", "dark"];
const theme = document.querySelector("[data-theme-switch]");
const setTheme = (name) => {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  theme.querySelector("span").textContent = name;
};
const stored = {
  get: () => { try { return localStorage.getItem("kd-theme"); } catch { return null; } },
  set: (name) => { try { localStorage.setItem("kd-theme", name); } catch { /* a browser may forbid it */ } },
};
setTheme(themes.includes(stored.get()) ? stored.get() : "system");
theme.addEventListener("click", () => {
  const name = themes[(themes.indexOf(theme.querySelector("span").textContent) + 1) % themes.length];
  setTheme(name);
  stored.set(name);
});
