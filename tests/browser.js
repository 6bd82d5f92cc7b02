// What is wrong with the page: where boxes are, how large letters are, how far they stand out from what is behind.
const width = document.documentElement.clientWidth, faults = [];
const name = e => {
  const text = (e.textContent || '').trim().slice(0, 40);
  return `<${e.tagName.toLowerCase()} class="${e.getAttribute('class') || ''}"> ${text}`;
};
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const paint = colors => {  // the colour, 0 to 255, of one over the other
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * x + .7152 * y + .0722 * z;
};
const contrast = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + .05) / (y + .05);
};
const behind = e => {
  const colors = [];
  for (; e; e = e.parentElement) {
    const style = getComputedStyle(e);
    // The one picture that stands behind text: the bar of a vote.
    if (style.backgroundImage !== 'none') colors.unshift(style.getPropertyValue('--bar'));
    colors.unshift(style.backgroundColor);
  }
  return paint(['white', ...colors]);
};
const scrolls = e => e && (getComputedStyle(e).overflowX === 'auto' || scrolls(e.parentElement));

const overflow = document.documentElement.scrollWidth - width;
if (overflow > 0) {
  const beyond = e => e.getBoundingClientRect().right > width + .5 && !scrolls(e);
  const wide = [...document.body.querySelectorAll('*')].filter(beyond);
  faults.push(`the page is ${overflow} px too wide: ` + wide.slice(-3).map(name).join('; '));
}
for (const e of document.querySelectorAll('figure, figure > svg, img, table')) {
  const box = e.getBoundingClientRect(), shown = e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
  if (!shown || box.width < 16 || box.height < 16) faults.push('not visible: ' + name(e));
  if (!scrolls(e) && (box.left < -.5 || box.right > width + .5)) faults.push('beyond the edge: ' + name(e));
  if (e.tagName === 'IMG' && !(e.complete && e.naturalWidth)) faults.push('no picture: ' + e.alt);
  if (e.tagName === 'svg') {
    const drawn = [...e.querySelectorAll('path')].filter(p => {
      const style = getComputedStyle(p), b = p.getBoundingClientRect();
      return (style.stroke !== 'none' || style.fill !== 'none') && b.width + b.height > 0;
    });
    if (drawn.length < 5) faults.push(`a drawing of ${drawn.length} paths: ` + e.getAttribute('aria-label'));
    if (!e.getAttribute('aria-label')) faults.push('a drawing without a label');
    for (const p of e.querySelectorAll('[clip-path], use')) {
      const id = (p.getAttribute('clip-path') || p.getAttribute('href')).replace(/^url\(|\)$/g, '').slice(1);
      if (!e.querySelector(`[id="${id}"]`)) faults.push('a drawing lacks #' + id);
    }
  }
}
const ids = [...document.querySelectorAll('[id]')].map(e => e.id), twice = ids.filter((id, k) => ids.indexOf(id) !== k);
if (twice.length) faults.push('ids that are not unique: ' + twice.slice(0, 5));
const ratios = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; node = walker.nextNode();) {
  const e = node.parentElement, style = getComputedStyle(e);
  if (!node.data.trim() || !e.checkVisibility()) continue;
  const drawing = e.closest('figure > svg');
  const box = drawing && drawing.getBoundingClientRect(), view = drawing && drawing.viewBox.baseVal;
  const size = parseFloat(style.fontSize) * (drawing ? box.width / view.width : 1);
  if (size < 10) faults.push(`letters of ${size.toFixed(1)} px: ` + name(e));
  if (drawing) {
    const b = e.getBoundingClientRect();
    if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
      faults.push('cut off in a drawing: ' + name(e));
  }
  const front = drawing ? style.fill : style.color, back = behind(drawing ? drawing.parentElement : e);
  const ratio = contrast(paint([`rgb(${back.slice(0, 3)})`, front]), back);
  if (ratio < 4.5) faults.push(`contrast of ${ratio.toFixed(2)}: ` + name(e));
}
if (document.scripts.length) faults.push('the page has a script');
return {faults: [...new Set(faults)], background: behind(document.body).slice(0, 3).join()};
