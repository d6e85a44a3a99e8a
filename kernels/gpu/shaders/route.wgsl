// What routing.wgsl finds, by a workgroup for each token.
struct P { ids_at: u32, ids_row: u32$FIELDS }
$BINDINGS
var<immediate> p: P;
$ROUTING
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) t: u32) { route(g.x, true, t); }
