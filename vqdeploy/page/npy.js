// Reads .npy files of numbers in C order.

const TYPES = { "|u1": Uint8Array, "<f4": Float32Array, "<f8": Float64Array, "<i8": BigInt64Array };

// Returns { shape, data }, with int64 turned into numbers.
export function readNpy(buffer) {
  const view = new DataView(buffer);
  const start = view.getUint8(6) === 1 ? 10 : 12;
  const size = start === 10 ? view.getUint16(8, true) : view.getUint32(8, true);
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, start, size));
  const [, dtype] = header.match(/'descr': '([^']*)'/) ?? [];
  if (!(dtype in TYPES) || !header.includes("'fortran_order': False")) throw new Error("not an array");
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((part) => part.trim());
  const data = new TYPES[dtype](buffer, start + size);
  return { shape: shape.map(Number), data: dtype === "<i8" ? Array.from(data, Number) : data };
}
