// The parts of attention.wgsl, each (largest score, sum of exp, values), into one row.
struct P { window: u32, parts: u32, n_heads: u32, first: u32, y_at: u32, y_row: u32$GATE_AT }
@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> o: array<f32>;
$BINDINGS
$SINKS
$FUNCTIONS
var<immediate> p: P;
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let token = p.first + g.y;
  let at = seen_by(token);
  let end_of_window = position_of(token) + 1u;
  let seen = select(0u, end_of_window - min(end_of_window, p.window), p.window > 0u);
  let size = $DIM_V + 2u;
  let begin = (g.y * p.n_heads + g.x) * p.parts * size;
  var most = $SINK;
  for (var i = seen / 256u; i <= at / 256u; i++) { most = max(most, o[begin + i * size]); }
  var sum = $SINK_POWER;
  for (var i = seen / 256u; i <= at / 256u; i++) { sum = fma(o[begin + i * size + 1u], exp(o[begin + i * size] - most), sum); }
  for (var d = t; d < $DIM_V; d += 64u) {
    var v = 0.0;
    for (var i = seen / 256u; i <= at / 256u; i++) { v = fma(o[begin + i * size + 2u + d], exp(o[begin + i * size] - most), v); }
    $y[p.y_at + token * p.y_row + g.x * $DIM_V + d] = let_through(v / sum, token, g.x * $DIM_V + d);
  }
}
$STEP
