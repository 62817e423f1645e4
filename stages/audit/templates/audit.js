"use strict";
(() => {
  const { id, run, items } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const stored = `recap-audit/${id}`;
  const SENTENCE = [["true", "true"], ["false", "false"], ["unsure", "cannot say"]];
  const WHOLE = [["acceptable", "acceptable"], ["unacceptable", "not acceptable"], ["unsure", "cannot say"]];
  let marks = {}; // "item/sentence" -> [verdict, time]; sentence "whole": the caption
  let place = 0;
  let line = 0;

  try {
    const saved = JSON.parse(localStorage.getItem(stored) || "{}");
    marks = saved.marks || {};
    place = Math.min(saved.place || 0, items.length - 1);
    byId("labeller").value = saved.labeller || "";
  } catch {
    marks = {}; // without storage, or with another page's, marks last as long as the page
  }

  const keep = () => {
    try {
      localStorage.setItem(stored, JSON.stringify({ marks, place, labeller: byId("labeller").value }));
    } catch {
      // a browser may refuse storage to local files
    }
  };
  const lines = () => [...items[place].sentences.keys(), "whole"];
  const isDone = (number) => marks[`${number}/whole`] !== undefined;

  const addLine = (name, text, choices) => {
    const entry = document.createElement("li");
    const words = document.createElement("div");
    words.textContent = text;
    words.className = name === "whole" ? "whole" : "";
    const buttons = document.createElement("div");
    buttons.className = "choices";
    for (const [verdict, label] of choices) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.dataset.verdict = verdict;
      button.setAttribute("aria-pressed", String((marks[`${place}/${name}`] || [])[0] === verdict));
      button.addEventListener("click", () => mark(name, verdict));
      buttons.append(button);
    }
    entry.append(words, buttons);
    byId("sentences").append(entry);
  };

  const show = () => {
    const item = items[place];
    byId("sentences").replaceChildren();
    item.sentences.forEach((text, number) => addLine(number, text, SENTENCE));
    addLine("whole", "The caption as a whole", WHOLE);
    byId("picture").hidden = !item.picture;
    byId("missing").hidden = Boolean(item.picture);
    if (item.picture) byId("picture").src = item.picture;
    const num = items.filter((_, number) => isDone(number)).length;
    byId("place").textContent = `${place + 1} of ${items.length}; ${num} labelled`;
    line = Math.min(line, lines().length - 1);
    byId("sentences").children[line].classList.add("current");
    byId("sentences").children[line].scrollIntoView({ block: "nearest" });
  };

  const go = (step) => {
    place = Math.max(0, Math.min(items.length - 1, place + step));
    line = 0;
    keep();
    show();
  };

  const mark = (name, verdict) => {
    marks[`${place}/${name}`] = [verdict, new Date().toISOString()];
    line = Math.min(lines().indexOf(name) + 1, lines().length - 1);
    keep();
    if (name === "whole" && place < items.length - 1) go(1);
    else show();
  };

  const save = () => {
    const labels = Object.entries(marks).map(([name, [verdict, at]]) => {
      const [number, sentence] = name.split("/");
      const { key, caption, candidate, text } = items[Number(number)];
      const labeller = byId("labeller").value.trim() || "anonymous";
      return { key, caption, candidate, sentence: sentence === "whole" ? null : Number(sentence), verdict, labeller, at, text };
    });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify({ run, labels }, null, 1)], { type: "application/json" }));
    link.download = `labels-${byId("labeller").value.trim().replace(/[^\p{L}\p{N}-]+/gu, "-") || "anonymous"}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  const KEYS = {
    t: () => line < lines().length - 1 && mark(lines()[line], "true"),
    f: () => line < lines().length - 1 && mark(lines()[line], "false"),
    u: () => mark(lines()[line], "unsure"),
    a: () => mark("whole", "acceptable"),
    x: () => mark("whole", "unacceptable"),
    s: save,
    ArrowUp: () => { line = Math.max(0, line - 1); show(); },
    ArrowDown: () => { line = Math.min(lines().length - 1, line + 1); show(); },
    ArrowLeft: () => go(-1),
    ArrowRight: () => go(1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.target.id === "labeller" || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = KEYS[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  byId("labeller").addEventListener("change", keep);
  byId("back").addEventListener("click", () => go(-1));
  byId("next").addEventListener("click", () => go(1));
  byId("save").addEventListener("click", save);
  if (items.length) show();
})();
