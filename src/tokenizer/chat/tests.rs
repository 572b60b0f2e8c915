use super::*;

/// 2026-11-22 23:05:09 UTC, a Sunday.
const NOW: u64 = 1_795_388_709;

fn chat<'a>() -> ChatContext<'a> {
    ChatContext { bos: "<s>", eos: "</s>", add_generation_prompt: true, now: NOW }
}

fn try_render(template: &str, messages: &[Message]) -> Result<String> {
    render_chat(template, messages, chat(), Path::new("x.gguf"), "tokenizer.chat_template")
}

fn talk(template: &str) -> String {
    let turns = [
        Message::new("system", " Be brief. "),
        Message::new("user", "Hi!"),
        Message::new("assistant", "Hello."),
        Message::new("user", "Why?"),
    ];
    try_render(template, &turns).unwrap()
}

/// Templates in the shape that each family publishes, and what they make of the conversation.
#[test]
fn every_family_renders_its_turns() {
    let llama3 = r#"{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{#- A system message is taken off the front. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;
    assert_eq!(
        talk(llama3),
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 22 Nov 2026\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    let qwen = r#"{%- if tools %}
    {{- '<tools>' + (tools | tojson) }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = [ns.last, index] | min %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.strip('\n').split('</think>')[-1].lstrip() %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;
    let chatml = "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n\
                  <|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n\
                  <|im_start|>assistant\n";
    assert_eq!(talk(qwen), chatml);
    let smollm2 = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}\
        {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    assert_eq!(talk(smollm2), chatml.replace("Be brief. ", " Be brief. "));
    let phi3 = "{% for message in messages %}{% if message['role'] == 'system' %}\
        {{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}\
        {{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}\
        {{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}";
    assert_eq!(
        talk(phi3),
        "<|system|>\n Be brief. <|end|>\n<|user|>\nHi!<|end|>\n<|assistant|>\nHello.<|end|>\n\
         <|user|>\nWhy?<|end|>\n<|assistant|>\n"
    );
}

#[test]
fn a_template_may_refuse_the_messages_in_its_own_words() {
    let gemma = r#"{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
    {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"#;
    // Blocks take the line break after them along, and the spaces before them.
    assert_eq!(
        try_render(gemma, &[Message::new("user", " Hi ")]).unwrap(),
        "<s>    <start_of_turn>user\nHi<end_of_turn>\n\n<start_of_turn>model\n"
    );
    let system = try_render(gemma, &[Message::new("system", "x")]).unwrap_err();
    assert_eq!(system.exit_code(), 2);
    assert!(system.to_string().contains("System role not supported"), "{system}");
    let mistral = "{{ bos_token }}{% for message in messages %}\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('roles must alternate') }}{% endif %}\
        {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
        {% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}";
    let turns = ["user", "assistant", "user"].map(|role| Message::new(role, role));
    assert_eq!(
        try_render(mistral, &turns).unwrap(),
        "<s>[INST] user [/INST]assistant</s>[INST] user [/INST]"
    );
    assert!(try_render(mistral, &turns[1..]).unwrap_err().to_string().contains("alternate"));
}

#[test]
fn what_is_no_template_or_fails_says_the_line() {
    for (template, said) in [
        ("a\n{% for %}", "line 2"),
        ("{{ messages.nothing.deeper }}", "undefined"),
        ("{% include 'x' %}", "line 1"),
        ("{{ open('x') }}", "unknown function"),
        ("{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", "undefined"),
        ("{{ strftime_now('%Q') }}", "%Q"),
    ] {
        match try_render(template, &[]) {
            Err(Error::InvalidModel { defect: Defect::BadTemplate, at, why, .. }) => {
                assert_eq!(at, "tokenizer.chat_template");
                assert!(why.contains(said), "{template}: {why}");
            }
            other => panic!("{template}: {other:?}"),
        }
    }
    let long = " ".repeat(MAX_TEMPLATE_BYTES + 1);
    assert!(try_render(&long, &[]).is_err());
}

/// What is nested deepest is dropped, printed and compared level by level.
#[test]
fn deep_values_do_not_overflow_the_stack() {
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}";
    for rest in
        ["", "{{ ns.x }}", "{{ ns.x == [ns.x] }}", "{{ ns.x | tojson }}", "{{ ns.x | list }}"]
    {
        // Either way is fine; dying is not.
        let _ = try_render(&format!("{deep}{rest}"), &[]);
    }
    let parens = format!("{{{{ {}1{} }}}}", "(".repeat(200_000), ")".repeat(200_000));
    assert!(try_render(&parens, &[]).is_err());
    let _ = try_render(&format!("{{{{ {}1 }}}}", "not ".repeat(200_000)), &[]);
    let _ = try_render(&format!("{{{{ 1{} }}}}", "+1".repeat(300_000)), &[]);
}

#[test]
fn python_methods_and_json_are_those_of_python() {
    let t = |template: &str| try_render(template, &[Message::new("user", "Hi")]).unwrap();
    assert_eq!(t("{{ ' a b '.strip().split(' ')[1].upper() }}"), "B");
    assert_eq!(t("{{ 'a-b-c'.replace('-', '+') }}"), "a+b+c");
    assert_eq!(t("{{ ', '.join(['x', 'y']) }}"), "x, y");
    assert_eq!(t("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}"), "a=1");
    assert_eq!(
        t("{{ messages | tojson }}{{ ['<&>', 1.5, none, true] | tojson }}"),
        r#"[{"role": "user", "content": "Hi"}]["<&>", 1.5, null, true]"#
    );
    assert_eq!(
        t("{{ {'a': [1], 'b': []} | tojson(indent=2) }}"),
        "{\n  \"a\": [\n    1\n  ],\n  \"b\": []\n}"
    );
    assert_eq!(
        t("{{ strftime_now('%A %-d %B %Y %H:%M:%S %p %j %y-%m-%d %a %I') }}"),
        "Sunday 22 November 2026 23:05:09 PM 326 26-11-22 Sun 11"
    );
    assert_eq!(strftime("%Y-%m-%d %a", 951_782_400).unwrap(), "2000-02-29 Tue");
    assert_eq!(strftime("%Y-%m-%d", 0).unwrap(), "1970-01-01");
    assert_eq!(strftime("%Y", u64::MAX).unwrap().len(), 12);
}

#[test]
fn no_value_holds_itself() {
    for way in [
        "{% set ns.n = ns %}{{ ns }}",
        "{%-\n set\tns . n=ns-%}{{ ns.n }}",
        "{%+ set ns.n = [1, {'a': (ns, 2)}] +%}{{ ns == ns }}",
        "{% set all = [ns] %}{% set ns.n = all %}{{ all ~ '' }}",
        "{% set ns.a, ns.b = 1, ns %}{{ ns | string }}",
        "{% set (ns.a) = ns %}{{ ns }}",
        "{% set ns.n | default(ns, true) %}{% endset %}{{ ns }}",
        "{% set other = namespace(inner=ns) %}{% set ns.n = other %}{{ other }}",
        "{% macro put(x) %}{% set ns.n = x %}{% endmacro %}{{ put(ns) }}{{ ns }}",
        "{# {% set a.b = ' #}{% set ns.n = ns %}{{ ns }}{# ' %} #}",
        "{{ '{% set a.b = ' }}{% set ns.n = '%}' and ns %}{{ ns }}",
        "{% for m in messages %}{% set ns.n = messages | map('default') | list + [ns] %}{% endfor %}{{ ns }}",
    ] {
        let error = try_render(
            &format!("{{% set ns = namespace(n=0) %}}{way}"),
            &[Message::new("user", "Hi")],
        );
        let said = error.expect_err(way).to_string();
        let known = said.contains("may not hold a namespace") || said.contains("syntax error");
        assert!(known, "{way}: {said}");
    }
    let kept =
        "{% set ns = namespace(n=0, t='') %}{% for m in messages %}{% set ns.n = ns.n + 1 -%}
        {% set ns.t = ns.t ~ \"%}'\" if loop.first else ns.t %}{% endfor -%}
        {% set ns.a, ns.b = 1, [2, {'c': m}] -%}
        {% set ns.text %}<{{ ns.n }}>{% endset -%}
        {% set ns.up | upper %}x{% endset -%}
        {{ ns.n }} {{ ns.t }} {{ ns.a }} {{ ns.b[0] }} {{ ns.text }} {{ ns.up }}";
    assert_eq!(talk(kept).trim(), "4 %}' 1 2 <4> X");
}
