//! `keys[h, position, :] = k[h, :]`, `values[h, position, :] = v[h, :]`

use super::{Arg, Buf, CacheRef, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Appends this token's keys and values to the cache, rounded to its element type.
#[derive(Clone, Debug, PartialEq)]
pub struct KvAppend {
    /// `[kv_heads, head_dim]` f32.
    pub k: Buf,
    /// `[kv_heads, head_dim]` f32.
    pub v: Buf,
    /// Where to.
    pub cache: CacheRef,
}

impl Describe for KvAppend {
    fn name(&self) -> &'static str {
        "kv_append"
    }

    fn shape(&self) -> String {
        let c = &self.cache;
        format!("[{}, {}] {}", c.kv_heads, c.head_dim, c.kind.name())
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.k, self.v]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let n = u64::from(self.cache.kv_heads * self.cache.head_dim);
        Traffic { weights: 0, kv: 2 * n * self.cache.kind.bytes(), activations: 8 * n }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        let c = &self.cache;
        Launch {
            module: "elementwise".into(),
            kernel: format!("kv_append_{}", c.kind.name()),
            grid: c.kv_heads,
            block: c.head_dim.next_multiple_of(32),
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.k),
                Arg::Buf(self.v),
                Arg::Keys(c.layer),
                Arg::Values(c.layer),
                Arg::U32(c.head_dim),
                Arg::U32(c.capacity),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let (k, v) = (mem.buf(self.k).to_vec(), mem.buf(self.v).to_vec());
        let (c, position) = (self.cache, mem.state.position as usize);
        let (dim, capacity) = (c.head_dim as usize, c.capacity as usize);
        let (keys, values) = mem.cache_mut(c.layer);
        for h in 0..c.kv_heads as usize {
            let at = (h * capacity + position) * dim;
            for i in 0..dim {
                keys[at + i] = HostMemory::cached(&c, k[h * dim + i]);
                values[at + i] = HostMemory::cached(&c, v[h * dim + i]);
            }
        }
    }
}
