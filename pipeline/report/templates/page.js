"use strict";
/* Filters, searches and enlarges the samples. It reads text and attributes of the page, and writes no markup. */
(() => {
  const bar = document.getElementById("filters");
  if (!bar) return;
  const control = (name) => bar.querySelector(`[name="${name}"]`);
  const names = ["text", "sheet", "reason", "pass", "flag", "score", "least", "most"];
  const controls = Object.fromEntries(names.map((name) => [name, control(name)]));
  const count = bar.querySelector("output");
  const fold = (text) => text.normalize("NFKC").toLowerCase();

  const describeCaption = (part) => ({
    pass: part.dataset.pass,
    reason: part.dataset.reason,
    flags: JSON.parse(part.dataset.flags),
    scores: JSON.parse(part.dataset.scores),
    text: fold(part.querySelector(".text")?.textContent ?? ""),
  });
  const cards = Array.from(document.querySelectorAll("article"), (article) => ({
    article,
    sheet: article.closest("section").id,
    captions: Array.from(article.querySelectorAll(".caption"), describeCaption),
    about: fold(Array.from(article.querySelectorAll(".about, .alt span[dir]"), (part) => part.textContent).join("\n")),
  }));

  const isInRange = (scores, wanted) => {
    const values = wanted.score ? [scores[wanted.score]] : Object.values(scores);
    return values.some((value) => typeof value === "number" && value >= wanted.least && value <= wanted.most);
  };
  const captionMatches = (caption, wanted) =>
    (!wanted.pass || caption.pass === wanted.pass) &&
    (!wanted.reason || caption.reason === wanted.reason) &&
    (!wanted.flag || caption.flags.includes(wanted.flag)) &&
    (!wanted.byScore || isInRange(caption.scores, wanted));
  const cardMatches = (card, wanted) => {
    if (wanted.sheet && card.sheet !== wanted.sheet) return false;
    const captions = card.captions.filter((caption) => captionMatches(caption, wanted));
    if (wanted.ofCaption && !captions.length) return false;
    const found = (word) => card.about.includes(word) || captions.some((caption) => caption.text.includes(word));
    return wanted.words.every(found);
  };

  const readControls = () => {
    const wanted = Object.fromEntries(names.map((name) => [name, controls[name]?.value ?? ""]));
    wanted.words = fold(wanted.text).split(/\s+/).filter(Boolean);
    wanted.byScore = wanted.score !== "" || wanted.least !== "" || wanted.most !== "";
    wanted.ofCaption = wanted.byScore || wanted.pass !== "" || wanted.reason !== "" || wanted.flag !== "";
    wanted.least = wanted.least === "" ? -Infinity : Number(wanted.least);
    wanted.most = wanted.most === "" ? Infinity : Number(wanted.most);
    return wanted;
  };
  const update = () => {
    const wanted = readControls();
    const shown = new Map();
    for (const card of cards) {
      card.article.hidden = !cardMatches(card, wanted);
      shown.set(card.sheet, (shown.get(card.sheet) ?? 0) + !card.article.hidden);
    }
    for (const [sheet, number] of shown) document.getElementById(sheet).hidden = number === 0;
    const total = Array.from(shown.values()).reduce((sum, number) => sum + number, 0);
    count.textContent = `${total} of ${cards.length} samples`;
  };
  bar.addEventListener("input", update);
  bar.querySelector("button").addEventListener("click", () => {
    for (const one of Object.values(controls)) if (one) one.value = "";
    update();
  });

  const dialog = document.getElementById("enlarged");
  const [previous, next, close] = dialog.querySelectorAll("button");
  let current = null;
  const visible = () => cards.map((card) => card.article).filter((article) => !article.hidden);
  const show = (article) => {
    const all = visible();
    const place = all.indexOf(article);
    current = article;
    dialog.querySelector("div").replaceChildren(article.cloneNode(true));
    previous.disabled = place <= 0;
    next.disabled = place === all.length - 1;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  };
  const step = (by) => {
    const all = visible();
    const article = all[all.indexOf(current) + by];
    if (article) show(article);
  };
  previous.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  for (const { article } of cards) {
    const picture = article.querySelector("img");
    if (!picture) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "picture";
    button.title = "Enlarge";
    picture.replaceWith(button);
    button.append(picture);
    button.addEventListener("click", () => show(article));
  }
  bar.hidden = false;
  update();
})();
