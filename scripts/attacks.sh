# Table 4 and Figure 3: align on safe rows, fine-tune on 80 harmful ones, count the answers that are no refusals.
. "$(dirname "$0")/functions.sh"

answer() {  # answer NAME ADAPTER SET...: to the harmful prompts that there are
    for set in "${@:3}"; do
        if [ ! -f data/$set.jsonl ]; then continue; fi  # PureBad is not public
        ask results/$1-$set.jsonl --adapter $2 --data data/$set.jsonl --score refusal --max-new-tokens 512
    done
}

for method in sft neftune gem im sdft lfu-lora; do  # Table 4
    train llama31 safe $method
    answer attack-$method-0 runs/llama31-safe-$method/adapter hexphi advbench purebad
    for warmup in 0.1 0; do  # which of them the paper used is not said
        run=attack-$method-warmup-$warmup
        train_llama31 $run --adapter runs/llama31-safe-$method/adapter --data data/harmful.jsonl --method sft \
            --limit 80 --drop --epochs 1 --learning-rate 3e-4 --warmup $warmup --save-every 1 --keep 5
        answer $run-5 runs/$run/adapter hexphi advbench purebad
    done
done
for method in sft lfu-lora; do  # Figure 3: after each step
    run=attack-$method-warmup-0.1
    for step in 1 2 3 4; do answer $run-$step runs/$run/checkpoints/step-$step hexphi purebad; done
done
