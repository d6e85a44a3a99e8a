// The pairs of a token and a slot in the order of their experts, and tiles of at most 32 of one expert: 0 how many tiles
// there are | 1 + 3 i the expert of tile i, where its pairs begin, how many | then the pairs from ``pairs_at`` on.
struct P { n_pairs: u32, n_used: u32, ids_at: u32, ids_row: u32, pairs_at: u32 }
@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> groups: array<u32>;
var<immediate> p: P;
var<workgroup> counts: array<atomic<u32>, $N>;
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) t: u32) {
  for (var i = t; i < $N; i += 256u) { atomicStore(&counts[i], 0u); }
  workgroupBarrier();
  for (var i = t; i < p.n_pairs; i += 256u) { atomicAdd(&counts[expert_of(i)], 1u); }
  workgroupBarrier();
  if (t == 0u) {
    var tile = 0u;
    var begin = p.pairs_at;
    for (var expert = 0u; expert < $N; expert++) {
      let n = atomicLoad(&counts[expert]);
      atomicStore(&counts[expert], begin);
      for (var first = 0u; first < n; first += 32u) {
        groups[1u + 3u * tile] = expert;
        groups[2u + 3u * tile] = begin + first;
        groups[3u + 3u * tile] = min(n - first, 32u);
        tile += 1u;
      }
      begin += n;
    }
    groups[0] = tile;
  }
  workgroupBarrier();
  for (var i = t; i < p.n_pairs; i += 256u) { groups[atomicAdd(&counts[expert_of(i)], 1u)] = i; }
}
fn expert_of(pair: u32) -> u32 {
  return min(ids[p.ids_at + pair / p.n_used * p.ids_row + pair % p.n_used], $N - 1u);
}
