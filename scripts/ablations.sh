# Tables 5, 6, 11, 13, 14 and 15: λ, α and layers; other losses; averages of weights. After tables.sh.
. "$(dirname "$0")/functions.sh"
for lam in 0.1 1 10 50; do variant lambda-$lam --method lfu-lora --lambda $lam; done  # 5a, 14
for alpha in 0.001 0.01 0.05 0.5; do variant alpha-$alpha --method lfu-lora --alpha $alpha; done  # 5a, 15
for span in 1-11 12-22 23-32; do variant layers-$span --method lfu-lora --layers $span; done  # 5b
for alpha in 0.001 0.01 0.1; do variant sam-$alpha --method sam --alpha $alpha; done  # 6b: 0.01
for norm in l1 l2; do
    for lam in 0.01 0.05 0.1; do variant $norm-$lam --method $norm --lambda $lam; done  # 6c, d: 0.01
done
for lam in 0.1 1 10; do variant logit-$lam --method logit-consistency --lambda $lam; done  # 6e: 1
for weight in 0.9 0.5 0.1; do  # 11a: β = 1 - weight, the share of the vanilla model
    score_adapter ensemble-$weight llama31 runs/llama31-gsm8k-sft/adapter $weight
done
for beta in 0.1 0.5 0.9; do  # 11b: 0.9
    train_llama31 sft-$beta --method sft --ema $beta
    score_adapter ema-$beta llama31 runs/sft-$beta/ema
done

table() { python "$here/table.py" "$@"; }
{
    table llama31-gsm8k-lfu-lora lambda-{0.1,1,10,50} alpha-{0.001,0.01,0.05,0.5} layers-{1-11,12-22,23-32}
    table sam-{0.001,0.01,0.1} {l1,l2}-{0.01,0.05,0.1} logit-{0.1,1,10} ensemble-{0.9,0.5,0.1} ema-{0.1,0.5,0.9}
} | tee results/ablations.txt
