// Written by ptx/build.sh: (module, PTX for compute 8.0, PTX for compute 9.0).
[
    ("attention_f16", include_str!("attention_f16.sm80.ptx"), include_str!("attention_f16.sm90.ptx")),
    ("attention_f32", include_str!("attention_f32.sm80.ptx"), include_str!("attention_f32.sm90.ptx")),
    ("elementwise", include_str!("elementwise.sm80.ptx"), include_str!("elementwise.sm90.ptx")),
    ("probe", include_str!("probe.sm80.ptx"), include_str!("probe.sm90.ptx")),
]
