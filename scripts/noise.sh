# Figure 6: what noise on the embeddings does to the states, one cosine a block, by method. After tables.sh.
. "$(dirname "$0")/functions.sh"
for method in sft neftune gem im sdft lfu-lora; do
    echo $method $(python "$here/noise.py" ${MODEL_IDS[llama31]} runs/llama31-gsm8k-$method/adapter data/gsm8k.jsonl)
done | tee results/noise.txt
