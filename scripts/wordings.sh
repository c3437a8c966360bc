# Figure 5: GSM8K asked in five wordings, mean and deviation by method. After tables.sh.
. "$(dirname "$0")/functions.sh"
methods="sft neftune gem im sdft lfu-lora"
python "$here/wordings.py" data/gsm8k-test.jsonl data
for method in $methods; do
    for number in 1 2 3 4 5; do
        ask results/wording-$method-$number.jsonl --adapter runs/llama31-gsm8k-$method/adapter --template plain --no-nll \
            --data data/wording-$number.jsonl
    done
    python "$here/spread.py" $method results/wording-$method-{1,2,3,4,5}.jsonl
done | tee results/wordings.txt
