// A block that a token fills, from float16 to 3 and 2 bits (kernels/cache_types.py): a thread finds the levels of 32 lanes
// of a dot, then it packs words of codes.
struct P { heads: u32, dim_k: u32, dim_v: u32, group: u32, newest: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> newest_keys: array<u32>;
@group(0) @binding(2) var<storage, read> newest_values: array<u32>;
@group(0) @binding(3) var<storage, read_write> keys: array<u32>;
@group(0) @binding(4) var<storage, read_write> values: array<u32>;
var<immediate> p: P;
struct Levels { error: f32, least: f32, by: f32, scale: u32, minimum: u32 }
var<workgroup> found: array<Levels, $MOST>;
$HALF_BITS
$MINIMUM_OF
$SCALE_OF_BYTE
fn code_of(v: f32, least: f32, by: f32, highest: f32) -> u32 { return u32(clamp((v - least) * by + 0.5, 0.0, highest)); }
fn levels_of(x: ptr<function, array<f32, 32>>, low: f32, high: f32, part: f32, centre: f32, highest: f32, per_scale: f32) -> Levels {
  let middle = (low + high) * 0.5;
  let wide = (high - low) * part;
  let far = abs(middle) * (per_scale * $PER_REACH);
  let bits = (half_bits(max(wide, far)) + 64u) >> 7u;
  let scale = select(bits, max(bits, 1u), max(wide, far) > 0.0);
  let d = scale_of_byte(scale);
  var by = 0.0;
  if (d != 0.0) { by = 1.0 / d; }
  let steps = (middle * by - select(highest * 0.5, centre, far > wide)) * per_scale;
  let near = clamp(steps, -$KNEE, $KNEE);
  let minimum = u32(clamp(near + (steps - near) * $PER_FAR_STEP + 128.5, 0.0, 255.0));
  let least = minimum_of(minimum) / per_scale * d;
  var error = 0.0;
  for (var i = 0u; i < 32u; i++) {
    let apart = (*x)[i] - (f32(code_of((*x)[i], least, by, highest)) * d + least);
    error += apart * apart;
  }
  return Levels(error, least, by, scale, minimum);
}
$PACK_KEYS
$PACK_VALUES
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let position = position_of(g.y);
  if (position % 32u != 31u) { return; }
  let source = table_entry(p.newest, g.y, position / 32u) * p.heads + g.x;
  let out = table_entry(p.group, g.y, position / 32u) * p.heads + g.x;
  for (var i = t; i < p.dim_k; i += 64u) { found[i] = levels_of_keys(source * p.dim_k * 16u + i * 16u); }
  workgroupBarrier();
  pack_keys(source * p.dim_k * 16u, out * p.dim_k * 7u / 2u, p.dim_k, 32u, t);
  workgroupBarrier();
  for (var i = t; i < p.dim_v; i += 64u) { found[i] = levels_of_values(source * p.dim_v * 16u + i * 16u); }
  workgroupBarrier();
  pack_values(source * p.dim_v * 16u, out * p.dim_v * 5u / 2u, 32u, p.dim_v, t);
}
$STEP
