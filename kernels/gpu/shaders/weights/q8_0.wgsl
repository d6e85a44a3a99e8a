struct Head { at: u32, d: f32 }
fn head(r: u32, j: u32) -> Head { return Head(j * 34u + 2u, half_at(r, j * 34u)); }
fn quad(r: u32, h: Head, i: u32) -> vec4<f32> { return h.d * i8x4(bytes4(r, h.at + 4u * i)); }
