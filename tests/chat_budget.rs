//! What a hostile chat template costs. The one test of its process: it measures the process's memory.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

use decode_graph::error::{Defect, Error};
use decode_graph::tokenizer::{ChatContext, Message, render_chat};
use std::path::Path;
use std::time::Instant;

/// Bytes that this process holds in memory at most, so far.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_hostile_template_ends_soon_in_little_memory_and_without_a_crash() {
    let bombs = [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' * 99999999 * 1 }}{{ ('a' * 99999999) | length }}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 999 }}{% endfor %}",
        "{% set a = 'a' * 500000 %}{{ a.replace('a', a) | length }}",
        "{% set a = 'a' * 500000 %}{{ a | replace('a', a) | length }}",
        "{% set a = 'a' * 500000 %}{{ a.join(a) | length }}",
        "{% set a = 'a' * 500000 %}{% for i in range(99999) %}{% set b = a.find('b') %}{% endfor %}",
        "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{{ '%900000000d' | format(1) }}",
        "{{ '{:>900000000}'.format('x') }}",
        "{{ '{:>{}}'.format('x', 900000000) }}",
        "{{ 'x' | indent(900000000, true) }}",
        "{% set x %}{% for i in range(99999) %}{{ messages }}{{ 'aaaaaaaa' * 9999 }}{% endfor %}{% endset %}",
    ];
    // Those that the budget misses are tests/cli.rs's: their threads last as long as the process.
    let before = peak();
    let turns = [Message::new("user", "Hi")];
    for bomb in bombs {
        let start = Instant::now();
        let failed =
            render_chat(bomb, &turns, ChatContext::default(), Path::new("x.gguf"), "template")
                .unwrap_err();
        assert!(
            matches!(&failed, Error::InvalidModel { defect: Defect::BadTemplate, .. }),
            "{bomb}: {failed}"
        );
        assert!(start.elapsed().as_secs_f64() < 2.0, "{bomb}: {:?}", start.elapsed());
    }
    let grown = peak() - before;
    assert!(grown < 256 << 20, "{grown} bytes");
}
