# Table 12: GSM8K after half an epoch, 1, 2, 3 and 4, as checkpoints of one run and as runs of their own.
. "$(dirname "$0")/functions.sh"
for method in sft lfu-lora; do
    run=epochs-$method
    train_llama31 $run --method $method --save-every 234 --keep 6  # an epoch is 468 steps
    for epochs in 1 2 4; do train_llama31 $run-$epochs --method $method --epochs $epochs; done
    for adapter in $run/checkpoints/step-{234,468,936,1404} $run-{1,2,4}/adapter; do
        ask results/${adapter//\//-}.jsonl --adapter runs/$adapter --data data/gsm8k-test.jsonl --prompt harness --no-nll
    done
done
