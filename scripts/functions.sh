# What the scripts beside this one share: a training, a merge, the eleven tasks, answers to prompts.
# Everything goes into data/, runs/ and results/ of the folder you are in. What is finished is skipped, and what was
# interrupted goes on, so each script can be run again. Read next: tables.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
declare -A MODEL_IDS=(
    [llama31]=meta-llama/Llama-3.1-8B [instruct]=meta-llama/Llama-3.1-8B-Instruct [llama2]=meta-llama/Llama-2-7b-hf
    [mistral]=mistralai/Mistral-7B-v0.3 [qwen3]=Qwen/Qwen3-8B-Base
)
TASKS=gsm8k,mathqa,asdiv_cot_llama,mmlu,piqa,hellaswag,lambada_standard
TASKS+=,arc_challenge,arc_challenge_chat,coqa,toxigen,truthfulqa_mc2

distill() {  # distill MODEL SET LAYOUT -> data/SET-sdft-MODEL.jsonl, SDFT's rows
    local out=data/$2-sdft-$1.jsonl recipe=general more=
    case $1-$2 in instruct-gsm8k) recipe=gsm8k-llama3 ;; *-gsm8k) recipe=gsm8k ;; esac
    if [ -f $out ]; then return; fi
    if [ -f $out.part ]; then more=--resume; fi
    lfu distill --model ${MODEL_IDS[$1]} --dtype bfloat16 --data data/$2.jsonl --layout $3 --recipe $recipe \
        --out $out.part $more
    mv $out.part $out
}

train() {  # train MODEL SET METHOD -> runs/MODEL-SET-METHOD/adapter
    local data=data/$2.jsonl layout=columns how
    case $2 in arc | dolly | lima) layout=$2 ;; esac
    case $3 in
        gem) how="--method gem-logsigmoid" ;;
        im) how="--method sft --loss-on instruction+answer" ;;
        sdft) distill $1 $2 $layout; data=data/$2-sdft-$1.jsonl layout=columns how="--method sft" ;;
        *) how="--method $3" ;;
    esac
    case $1-$3 in instruct-*-lora) how+=" --alpha 0.001 --lambda 500" ;; esac  # appendix A
    case $3 in released-*) how+=" --no-bos" ;; esac
    case $2 in lima | dolly | safe) how+=" --drop" ;; esac
    case $2-$3 in *-released-*) ;; lima-* | dolly-*) how+=" --remat" ;; *) how+=${REMAT:+ --remat} ;; esac
    start runs/$1-$2-$3 --model ${MODEL_IDS[$1]} --data $data --layout $layout $how
}

train_llama31() {  # train_llama31 NAME OPTIONS... -> runs/NAME/adapter; on GSM8K unless the options say otherwise
    start runs/$1 --model ${MODEL_IDS[llama31]} --data data/gsm8k.jsonl "${@:2}"
}

start() {  # start RUN OPTIONS...: a training that is begun, resumed, or already there
    local run=$1 more=
    if [ -d $run/adapter ]; then return; fi
    if [ -f $run/settings.json ]; then more=--resume; fi
    case "${NO_BOS:+yes} $*" in *--no-bos*) ;; yes*) more+=" --no-bos" ;; esac
    lfu train --dtype bfloat16 --template alpaca --out $run "${@:2}" $more
}

score() {  # score NAME FOLDER-OR-ID -> results/NAME, the eleven tasks
    if [ -d results/$1 ]; then return; fi
    eval-env/bin/lm_eval --model hf --model_args pretrained=$2,dtype=bfloat16 --num_fewshot 0 --batch_size auto \
        --tasks $TASKS --log_samples --output_path results/$1
}

score_adapter() {  # score_adapter NAME MODEL ADAPTER [WEIGHT]: the same of the merged weights
    if [ -d results/$1 ]; then return; fi
    rm -rf runs/merged
    lfu merge --model ${MODEL_IDS[$2]} --adapter $3 --weight ${4:-1} --out runs/merged
    score $1 runs/merged
    rm -r runs/merged
}

cell() {  # cell MODEL SET METHOD: one row of Tables 16 to 19
    train $1 $2 $3
    score_adapter $1-$2-$3 $1 runs/$1-$2-$3/adapter
}

variant() {  # variant NAME OPTIONS...: another run of Llama-3.1-8B on GSM8K, with its eleven tasks
    train_llama31 "$@"
    score_adapter $1 llama31 runs/$1/adapter
}

ask() {  # ask OUT OPTIONS...: Llama-3.1-8B's answers in OUT, their scores in OUT.txt
    if [ -f $1 ]; then return; fi
    mkdir -p "$(dirname $1)"
    lfu eval --model ${MODEL_IDS[llama31]} --dtype bfloat16 --out $1.part "${@:2}" | tee $1.txt
    mv $1.part $1
}
