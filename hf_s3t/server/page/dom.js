// Small things for building the page. Whatever comes from elsewhere becomes text, never markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const plural = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

export const number = (value, digits = 0) =>
  value === null || value === undefined ? "?" : value.toLocaleString("en", { maximumFractionDigits: digits });

export const clock = (time = new Date()) => time.toLocaleTimeString("en-GB");

export const when = (time) => new Date(time).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });

// "in 3 hours", "2 minutes ago"
export function fromNow(time, now = Date.now()) {
  const seconds = (new Date(time).getTime() - now) / 1000;
  const [unit, size] = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]]
    .find(([, length]) => Math.abs(seconds) >= length) ?? ["second", 1];
  return new Intl.RelativeTimeFormat("en").format(Math.round(seconds / size), unit);
}

export function seconds(value) {
  return value < 1 ? `${number(value * 1000, value < 0.1 ? 1 : 0)} ms` : `${number(value, 1)} s`;
}

// Enter sends a form's text, Shift and Enter begin a new line; not while an input method composes.
export function sendOnEnter(area) {
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      area.form.requestSubmit();
    }
  });
}
