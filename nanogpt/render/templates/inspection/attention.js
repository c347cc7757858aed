// Select a head by its map and a token by pointing at it; tokens are shaded by the weights of
// the selected head. A map's pixels are the data: opacity is the square root of the weight.
(() => {
  const root = document.currentScript.parentElement;
  const tokens = [...root.querySelectorAll("pre span")];
  const maps = [...root.querySelectorAll(".maps button")];
  const headName = root.querySelector(".head");
  let pixels;
  let numTokens;
  let selected = tokens.length - 1;

  function shadeTokens() {
    tokens.forEach((token, i) => {
      const opacity = i <= selected ? pixels[4 * (selected * numTokens + i) + 3] / 255 : 0;
      token.style.setProperty("--shade", opacity);
      token.classList.toggle("selected", i === selected);
    });
  }

  async function selectMap(map) {
    const image = map.querySelector("img");
    await image.decode();
    const canvas = document.createElement("canvas");
    numTokens = image.naturalWidth;
    canvas.width = numTokens;
    canvas.height = numTokens;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    pixels = context.getImageData(0, 0, numTokens, numTokens).data;
    maps.forEach((other) => other.setAttribute("aria-pressed", other === map));
    headName.textContent = map.title;
    shadeTokens();
  }

  function selectToken(i) {
    selected = i;
    if (pixels) shadeTokens();
  }

  maps.forEach((map) => map.addEventListener("click", () => selectMap(map)));
  tokens.forEach((token, i) => {
    for (const event of ["mouseenter", "click"]) token.addEventListener(event, () => selectToken(i));
  });
  selectMap(maps[0]);
})();
