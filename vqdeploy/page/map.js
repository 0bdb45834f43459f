// The map of tokens: a button per token, in the colour of its code and at its place in the picture.
// Only one of them is in the tab order; arrow keys move between them.

const NUMBERED = 8; // each token shows its code if a row has at most so many
const ACROSS = 16; // tokens in a row if they have no grid

export class TokenMap {
  // shape: the latents' shape, (S,), (h, w) or (h, w, g). chosen: called with the place of a token.
  constructor(element, shape, colours, chosen) {
    const [count, across, depth] = shape;
    this.colours = colours;
    this.depth = depth ?? 1;
    this.columns = across ?? Math.min(count, ACROSS);
    this.rows = across === undefined ? Math.ceil(count / this.columns) : count;
    this.cells = Array.from({ length: shape.reduce((a, b) => a * b) }, (_, place) => this.#cell(place, chosen));
    for (let level = 0; level < this.depth; level++) {
      const grid = document.createElement("div");
      grid.className = "cells";
      grid.setAttribute("role", "group");
      grid.setAttribute("aria-label", `Map of ${this.rows} by ${this.columns} tokens${this.#level(level)}`);
      grid.style.gridTemplateColumns = `repeat(${this.columns}, 1fr)`;
      grid.append(...this.cells.filter((_, place) => place % this.depth === level));
      element.append(grid);
    }
    this.choose(null);
  }

  // Says in words where a token lies.
  where(place) {
    const [cell, level] = [Math.floor(place / this.depth), place % this.depth];
    const [row, column] = [Math.floor(cell / this.columns) + 1, (cell % this.columns) + 1];
    return `row ${row}, column ${column}${this.#level(level)}`;
  }

  show(tokens, own) {
    this.cells.forEach((cell, place) => {
      const code = tokens[place];
      const colour = this.colours[code];
      cell.style.backgroundColor = colour;
      cell.style.color = isLight(colour) ? "#000" : "#fff";
      cell.textContent = this.columns <= NUMBERED ? code : "";
      cell.dataset.code = code;
      const swapped = code !== own[place];
      cell.classList.toggle("swapped", swapped);
      cell.setAttribute("aria-label", `${this.where(place)}: code ${code}${swapped ? ", swapped" : ""}`);
    });
  }

  choose(place) {
    this.cells.forEach((cell, i) => {
      cell.setAttribute("aria-pressed", i === place);
      cell.tabIndex = i === (place ?? 0) ? 0 : -1;
    });
  }

  #level(level) {
    return this.depth > 1 ? `, level ${level + 1}` : "";
  }

  #cell(place, chosen) {
    const cell = document.createElement("button");
    cell.type = "button";
    cell.addEventListener("click", () => chosen(place));
    cell.addEventListener("keydown", (event) => {
      const [across, down] = [this.depth, this.depth * this.columns];
      const step = { ArrowLeft: -across, ArrowRight: across, ArrowUp: -down, ArrowDown: down }[event.key];
      const next = this.cells[place + (step ?? NaN)];
      if (!next) return;
      event.preventDefault();
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    return cell;
  }
}

// Returns whether black is easier to read on a colour "#rrggbb" than white.
function isLight(colour) {
  const linear = [1, 3, 5].map((at) => (parseInt(colour.slice(at, at + 2), 16) / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18;
}
