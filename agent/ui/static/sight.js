// What part of the picture is seen: dragged by pointer, scaled by wheel and buttons, fitted until somebody moves it.

const LEAST = 0.25;
const MOST = 3;
const MARGIN = 28;
const FEET = 56; // of the legend and the tools

export class Sight {
  constructor(picture, scene) {
    this.picture = picture;
    this.scene = scene;
    this.moved = false;
    this.width = this.height = 1;
    Object.assign(this, { x: 0, y: 0, scale: 1 });
    new ResizeObserver(() => this.moved || this.fit()).observe(picture);
    picture.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    picture.addEventListener("pointerdown", (event) => this.drag(event));
  }

  // The picture's own size; it is fitted anew when that changes, unless somebody chose what to see.
  size(width, height) {
    const same = width === this.width && height === this.height;
    Object.assign(this, { width, height });
    if (!same && !this.moved) this.fit();
  }

  fit() {
    const seen = this.picture.getBoundingClientRect();
    if (!seen.width) return;
    this.scale = Math.max(this.scaleOf(this), LEAST);
    this.x = Math.max((seen.width - this.width * this.scale) / 2, MARGIN / 2);
    this.y = Math.max((seen.height - FEET + MARGIN / 2 - this.height * this.scale) / 2, MARGIN / 2);
    this.moved = false;
    this.apply();
  }

  // How large a picture of a size would be seen, at most a little larger than it is.
  scaleOf({ width, height }) {
    const seen = this.picture.getBoundingClientRect();
    return Math.min((seen.width - 2 * MARGIN) / width, (seen.height - FEET - MARGIN) / height, 1.25);
  }

  scaleBy(factor, x = this.picture.clientWidth / 2, y = this.picture.clientHeight / 2) {
    const scale = Math.min(Math.max(this.scale * factor, LEAST), MOST);
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.moved = true;
    this.apply();
  }

  // Brings a rectangle of the picture into sight.
  reveal({ x, y, width, height }) {
    const [left, top] = [x * this.scale + this.x, y * this.scale + this.y];
    const seen = this.picture.getBoundingClientRect();
    const outside =
      left < 0 ||
      top < 0 ||
      left + width * this.scale > seen.width ||
      top + height * this.scale > seen.height;
    if (!outside) return;
    this.x += seen.width / 2 - left - (width * this.scale) / 2;
    this.y += seen.height / 2 - top - (height * this.scale) / 2;
    this.moved = true;
    this.apply();
  }

  wheel(event) {
    event.preventDefault();
    const seen = this.picture.getBoundingClientRect();
    this.scaleBy(
      Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)),
      event.clientX - seen.left,
      event.clientY - seen.top,
    );
  }

  drag(down) {
    if (down.button !== 0 || down.target !== this.picture) return;
    const from = { x: this.x - down.clientX, y: this.y - down.clientY };
    this.picture.setPointerCapture(down.pointerId);
    const moves = (event) => {
      Object.assign(this, { x: from.x + event.clientX, y: from.y + event.clientY, moved: true });
      this.apply();
    };
    this.picture.addEventListener("pointermove", moves);
    this.picture.addEventListener("pointerup", () => this.picture.removeEventListener("pointermove", moves), {
      once: true,
    });
  }

  apply() {
    this.scene.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${this.scale})`);
  }
}
