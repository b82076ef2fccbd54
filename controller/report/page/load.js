// Blocks of compressed data: in the page itself, or asked of the server that `rlhf-dist watch` runs.

const LIVE = document.body.dataset.mode === "live";
const POLL_MS = 2000;
const KEPT = 8;  // unpacked blocks that are held
const unpackedBlocks = new Map();

async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function bytesOf(name) {
  const text = atob(document.getElementById(`block-${name}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return bytes;
}

async function loadBlock(name) {
  if (!unpackedBlocks.has(name)) {
    unpackedBlocks.set(name, LIVE ? asked(name) : unpack(bytesOf(name)).then(JSON.parse));
    if (unpackedBlocks.size > KEPT) unpackedBlocks.delete(unpackedBlocks.keys().next().value);
  }
  return unpackedBlocks.get(name);
}

async function asked(name) {
  const answer = await fetch(`block/${name}`);
  if (!answer.ok) throw new Error(`${name}: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

// The chart library is text until here; the page's policy knows its hash.
async function loadLibrary() {
  const script = document.createElement("script");
  script.textContent = await unpack(bytesOf("library"));
  document.head.append(script);
}
