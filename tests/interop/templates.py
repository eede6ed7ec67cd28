"""Conversations by transformers' chat templates, for `lora`'s.

    pip install torch transformers
    python tests/interop/templates.py FOLDER cases.json    # a folder with templates, *.jinja
    LORA_TEMPLATES=cases.json cargo test -p loralib-cli --bin lora -- --ignored --nocapture templates
"""

import json
import pathlib
import sys

from transformers.utils.chat_template_utils import _compile_jinja_template

folder, out = map(pathlib.Path, sys.argv[1:])
user = lambda text: {"role": "user", "content": text}
assistant = lambda text: {"role": "assistant", "content": text}
system = {"role": "system", "content": " Be brief.\n"}
CONVERSATIONS = [
    [user("Hi")],
    [user(" Hi \n there "), assistant(" Hello! "), user("1 < 2 & \"3\" 'é' \\n")],
    [system, user("Hi"), assistant("Hello"), user("And?"), assistant("<think>\nHm.\n</think>\n\nYes.")],
    [user("Hi"), user("again")],
]
cases = []
for file in sorted(folder.glob("*.jinja")):
    source = file.read_text()
    for messages in CONVERSATIONS:
        for reply in (False, True):
            case = dict(name=file.stem, source=source, bos="<s>", eos="</s>", messages=messages, reply=reply)
            try:
                template = _compile_jinja_template(source)
                case["expected"] = template.render(messages=messages, add_generation_prompt=reply, bos_token="<s>",
                                                   eos_token="</s>", tools=None, documents=None)
            except Exception as error:
                case["error"] = str(error)
            cases.append(case)
out.write_text(json.dumps(cases))
print(f"{len(cases)} cases of {len({c['name'] for c in cases})} templates, {sum('error' in c for c in cases)} refused")
