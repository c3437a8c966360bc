# bash data.sh SET...: the paper's data as JSONL in data/. Sets: gsm8k arc dolly lima beavertails attacks
. "$(dirname "$0")/functions.sh"
mkdir -p data raw
github=https://raw.githubusercontent.com

gsm8k() {  # 7,473 and 1,319 rows, those of openai/gsm8k (main) on the hub
    for split in train test; do
        curl -fLo data/gsm8k-$split.jsonl $github/openai/grade-school-math/master/grade_school_math/data/$split.jsonl
    done
    cp data/gsm8k-train.jsonl data/gsm8k.jsonl
}

arc() {  # 1,119 rows
    eval-env/bin/python -c "from datasets import load_dataset
load_dataset('allenai/ai2_arc', 'ARC-Challenge', split='train').to_json('data/arc.jsonl')"
}

dolly() {  # about 3,000 rows
    local commit=656f907d98ffd4988d19b563f576c66ffb85d0f7
    curl -fLo raw/dolly_3k.json $github/gpt4life/alpagasus/$commit/data/filtered/dolly_3k.json
    python -c "import json; [print(json.dumps(row)) for row in json.load(open('raw/dolly_3k.json'))]" > data/dolly.jsonl
}

lima() {  # 1,030 rows; gated
    hf download GAIR/lima train.jsonl --repo-type dataset --local-dir raw/lima
    cp raw/lima/train.jsonl data/lima.jsonl
}

beavertails() {  # data/safe.jsonl and data/harmful.jsonl
    curl -fLo raw/beavertails.json \
        $github/domenicrosati/representation-noising/main/data/beavertails_with_refusals_train.json
    python "$here/beavertails.py" raw/beavertails.json data
}

attacks() {  # data/advbench.jsonl, 520 rows, and data/hexphi.jsonl, 300; HEx-PHI is gated
    local commit=2be2fa01775fdf8bfc786d69fc0d358f0b3df513
    curl -fLo raw/advbench.csv \
        $github/LLM-Tuning-Safety/LLMs-Finetuning-Safety/$commit/llama2/safety_evaluation/data/harmful_behaviors.csv
    hf download LLM-Tuning-Safety/HEx-PHI --repo-type dataset --include "*.csv" --local-dir raw/hexphi
    python "$here/prompts.py" data/advbench.jsonl raw/advbench.csv
    python "$here/prompts.py" data/hexphi.jsonl raw/hexphi/*.csv
}

for set in "${@:?name them: gsm8k arc dolly lima beavertails attacks}"; do $set; done
