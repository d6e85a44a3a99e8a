// A block that a token fills, from float16 to 2 bits (kernels/cache_types.py): a thread packs four dots of 16 lanes.
struct P { heads: u32, dim_k: u32, dim_v: u32, group: u32, newest: u32 }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> newest_keys: array<u32>;
@group(0) @binding(2) var<storage, read> newest_values: array<u32>;
@group(0) @binding(3) var<storage, read_write> keys: array<u32>;
@group(0) @binding(4) var<storage, read_write> values: array<u32>;
var<immediate> p: P;
struct Levels { error: f32, least: f32, by: f32, scale: u32, minimum: u32 }
$HALF_BITS
$MINIMUM_OF
$SCALE_OF_BYTE
fn levels_of(x: ptr<function, array<f32, 16>>, low: f32, high: f32, part: f32, centre: f32) -> Levels {
  let middle = (low + high) * 0.5;
  let wide = (high - low) * part;
  let far = abs(middle) * $PER_REACH;
  let bits = (half_bits(max(wide, far)) + 64u) >> 7u;
  let scale = select(bits, max(bits, 1u), max(wide, far) > 0.0);
  let d = scale_of_byte(scale);
  var by = 0.0;
  if (d != 0.0) { by = 1.0 / d; }
  let eighths = (middle * by - select(1.5, centre, far > wide)) * 8.0;
  let near = clamp(eighths, -$KNEE, $KNEE);
  let minimum = u32(clamp(near + (eighths - near) * $PER_FAR_STEP + 128.5, 0.0, 255.0));
  let least = minimum_of(minimum) * d;
  var error = 0.0;
  for (var i = 0u; i < 16u; i++) {
    let apart = (*x)[i] - (f32(code_of((*x)[i], least, by)) * d + least);
    error += apart * apart;
  }
  return Levels(error, least, by, scale, minimum);
}
fn code_of(v: f32, least: f32, by: f32) -> u32 { return u32(clamp((v - least) * by + 0.5, 0.0, 3.0)); }
$PACK_KEYS
$PACK_VALUES
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let position = position_of(g.y);
  if (position % 32u != 31u) { return; }
  let source = table_entry(p.newest, g.y, position / 32u) * p.heads + g.x;
  let out = table_entry(p.group, g.y, position / 32u) * p.heads + g.x;
  for (var i = t; i < p.dim_k / 2u; i += 64u) {
    pack_keys(source * p.dim_k * 16u, out * p.dim_k * 3u, p.dim_k, 32u, i);
  }
  for (var i = t; i < p.dim_v / 2u; i += 64u) {
    pack_values(source * p.dim_v * 16u, out * p.dim_v * 3u, 32u, p.dim_v, i);
  }
}
$STEP
