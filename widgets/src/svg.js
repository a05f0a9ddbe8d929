// SVG elements by hand; text always goes through textContent.

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, text = undefined) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  if (text !== undefined) element.textContent = text;
  return element;
}

export const minus = (value) => String(value).replace("-", "−");
