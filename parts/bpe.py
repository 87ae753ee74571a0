"""Train byte-pair tokenizers on a text."""

import heapq
from collections import Counter, defaultdict

import regex  # comes with tiktoken

from parts.cli import progress_bar
from parts.tokenizer import pieces

# words, numbers of up to three digits, punctuation, spaces; a space belongs to the word after it
WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONGEST_WORD = 1000  # characters


def count_words(docs):
    """Return how often each word occurs in docs, a Counter. A long word is counted in parts."""
    counts = Counter()
    with progress_bar(total=sum(map(len, docs)), desc="counting words", unit="char",
                      unit_scale=True) as bar:
        for doc in docs:
            for piece in pieces(doc, bar):
                counts.update(regex.findall(WORDS, piece))
    for word in [word for word in counts if len(word) > LONGEST_WORD]:
        count = counts.pop(word)
        for i in range(0, len(word), LONGEST_WORD):
            counts[word[i:i + LONGEST_WORD]] += count
    return counts


def train_bpe(docs, vocab_size):
    """Return byte-pair ranks {bytes: id} of at most vocab_size tokens. Repeatedly, the most
    frequent pair of neighbours becomes a token (Sennrich et al. 2016); among equally frequent pairs
    the one with the lowest ids comes first."""
    # each distinct word once, as a string in which the character chr(i) stands for token i
    word_counts = count_words(docs)
    words = [word.encode().decode("latin-1") for word in word_counts]
    counts = list(word_counts.values())

    # how often each pair occurs, and in which words: a merge reads only these words
    pair_counts, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([i]) for i in range(256)]
    with progress_bar(total=vocab_size - 256, desc="training tokenizer", unit="merge") as bar:
        while heap and heap[0][0] < 0 and len(tokens) < vocab_size:
            count, best = heapq.heappop(heap)
            if count != -pair_counts[best]:  # the pair has become less frequent since it was pushed
                heapq.heappush(heap, (-pair_counts[best], best))
                continue
            a, b = best
            new, made = chr(len(tokens)), set()  # the new token, and the pairs that contain it
            tokens.append(tokens[ord(a)] + tokens[ord(b)])
            for i in where.pop(best):
                before, words[i] = words[i], words[i].replace(a + b, new)
                for pair in zip(before, before[1:]):
                    pair_counts[pair] -= counts[i]
                for pair in zip(words[i], words[i][1:]):
                    pair_counts[pair] += counts[i]
                    if new in pair:
                        where[pair].add(i)
                        made.add(pair)
            for pair in made:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            bar.update()
    return {token: i for i, token in enumerate(tokens)}
