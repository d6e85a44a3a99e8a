// Keys (block, head, dim, 32 positions) and values (block, head, 32 positions, dim), float16.
struct P { heads: u32, dim_k: u32, dim_v: u32, group: u32, k_at: u32, k_row: u32, v_at: u32, v_row: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read_write> keys: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read_write> values: array<atomic<u32>>;
$BINDINGS
var<immediate> p: P;
$PUT
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let at = position_of(g.y);
  let block = table_entry(p.group, g.y, at / 32u);
  let o = at % 32u;
  let i = g.x * 64u + t;
  if (i < p.heads * p.dim_k) {
    put_keys((block * p.heads * p.dim_k + i) * 32u + o, $k[p.k_at + g.y * p.k_row + i]);
  }
  if (i < p.heads * p.dim_v) {
    let e = ((block * p.heads + i / p.dim_v) * 32u + o) * p.dim_v + i % p.dim_v;
    put_values(e, $v[p.v_at + g.y * p.v_row + i]);
  }
}
$STEP
