// What a batch tells the shaders: a header of 64 words (step.py), then an item for each token, block tables, angles.
fn position_of(t: u32) -> u32 { return b[b[2] + t]; }
fn seen_by(t: u32) -> u32 { return b[b[6] + t]; }  // the last position, its own or a later one
fn type_of(t: u32) -> u32 { return b[b[7] + t]; }
fn sequence_of(t: u32) -> u32 { return b[b[3] + t]; }
fn table_entry(group: u32, t: u32, i: u32) -> u32 { return b[b[8u + 2u * group] + sequence_of(t) * b[9u + 2u * group] + i]; }
fn scale_of(t: u32, adapter: u32) -> f32 { return bitcast<f32>(b[b[30] + t * b[31] + adapter]); }
