// Rows as they stand in a file to rows side by side (words.wgsl), zeros behind the last byte of a row.
struct P { row_nbytes: u32, words: u32, rows: u32, first_group: u32 }
@group(0) @binding(0) var<storage, read> raw: array<u32>;
@group(0) @binding(1) var<storage, read_write> w: array<u32>;
var<immediate> p: P;
@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let row = g.y * 32u + t;
  for (var i = g.x * 32u; i < min(g.x * 32u + 32u, p.words); i++) {
    var v = 0u;
    if (row < p.rows && 4u * i < p.row_nbytes) {
      let at = row * p.row_nbytes + 4u * i;
      let shift = (at & 3u) * 8u;
      v = raw[at >> 2u] >> shift;
      if (shift != 0u) { v |= raw[(at >> 2u) + 1u] << (32u - shift); }
      let left = p.row_nbytes - 4u * i;
      if (left < 4u) { v &= (1u << (8u * left)) - 1u; }
    }
    w[((p.first_group + g.y) * p.words + i) * 32u + t] = v;
  }
}
