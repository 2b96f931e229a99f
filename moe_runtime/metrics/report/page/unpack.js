"use strict";
// The page carries Bokeh and its data compressed, in base64.

function bytesOf(base64) {
  const letters = atob(base64);
  const bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) bytes[place] = letters.charCodeAt(place);
  return bytes;
}

async function unpacked(id) {
  const bytes = bytesOf(document.getElementById(id).textContent.trim());
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const float64s = (base64) => new Float64Array(bytesOf(base64).buffer);
const float32s = (base64) => new Float32Array(bytesOf(base64).buffer);
const uint16s = (base64) => new Uint16Array(bytesOf(base64).buffer);
