// SPDX-License-Identifier: Apache-2.0
#include "race.h"

#include <algorithm>

namespace vimcore::shim {

void Races::start_block(int warps)
{
    for (const int shift : {1, 2})
        if (words_[shift].size() <= bytes_ >> shift) words_[shift].resize((bytes_ >> shift) + 2);
    if (epoch_ == 0 || seen_[0][0] > never / 2) {  // the first time, and before ticks run out
        for (auto& words : words_) std::fill(words.begin(), words.end(), Word{});
        readers_.assign(1, {});
        for (auto& row : seen_) row.fill(1);
    }
    warps_ = 32;
    order_all();
    warps_ = warps;
}

// From words of four bytes to words of two.
void Races::refine()
{
    shift_ = 1;
    for (std::size_t i = 0; i <= bytes_ / 2; i++) {
        const Word& from = words_[2][i / 2];
        Word& to = words_[1][i];
        const std::uint32_t readers = to.readers;
        to = from;
        to.readers = readers;
        if (from.reader != many || from.read_tick != epoch_) continue;
        const Readers copy = readers_[from.readers];  // readers_of may move them all
        readers_of(to) = copy;
    }
    for (Word& word : words_[2]) word.write_tick = 0;  // later kernels must not find copies under way here
}

Races::Readers& Races::readers_of(Word& word)
{
    if (word.readers == 0) {
        word.readers = static_cast<std::uint32_t>(readers_.size());
        readers_.emplace_back();
    }
    return readers_[word.readers];
}

void Races::order_all()
{
    std::uint32_t next = 0;
    for (int w = 0; w < warps_; w++) next = std::max(next, seen_[w][w] + 1);
    for (int w = 0; w < warps_; w++)
        for (int v = 0; v < warps_; v++) seen_[w][v] = next;
    epoch_++;
}

void Races::order(std::uint32_t warps)
{
    std::array<std::uint32_t, 32> joined{};
    for (int w = 0; w < warps_; w++)
        if (warps >> w & 1) {
            seen_[w][w]++;
            // all of them: memory remembers warps of larger blocks before
            for (int v = 0; v < 32; v++) joined[v] = std::max(joined[v], seen_[w][v]);
        }
    for (int w = 0; w < warps_; w++)
        if (warps >> w & 1) seen_[w] = joined;
}

void Races::add_reader(Word& word, int warp, std::uint16_t self)
{
    const std::uint32_t now = seen_[warp][warp];
    if (word.reader == many && word.read_tick == epoch_) {
        Readers& readers = readers_[word.readers];
        const bool another = readers.tick[warp] == now && readers.lane[warp] != self % 64;
        readers.tick[warp] = now;
        readers.lane[warp] = another ? several : self % 64;
    } else if (word.reader == many || word.reader == self || ordered(warp, word.reader, word.read_tick)) {
        word.reader = self;
        word.read_tick = now;
    } else if (word.reader / 64 == warp) {  // in the same tick: otherwise it was ordered
        word.reader = static_cast<std::uint16_t>(warp * 64 + several);
    } else {
        Readers& readers = readers_of(word);
        readers.tick.fill(0);
        readers.tick[word.reader / 64] = word.read_tick;
        readers.lane[word.reader / 64] = word.reader % 64;
        readers.tick[warp] = now;
        readers.lane[warp] = self % 64;
        word.reader = many;
        word.read_tick = epoch_;
    }
}

Races::Conflict Races::write(int thread, std::size_t offset, std::size_t bytes)
{
    const int warp = thread / 32;
    const std::uint16_t self = name(thread);
    for (Word& word : words(offset, bytes)) {
        if (conflicts(word, warp, self)) return {true, word.write_tick == never, true, thread_of(word.writer)};
        if (word.reader != many) {
            if (word.reader != self && !ordered(warp, word.reader, word.read_tick))
                return {true, false, false, thread_of(word.reader)};
        } else if (word.read_tick == epoch_) {
            const Readers& readers = readers_[word.readers];
            for (int w = 0; w < warps_; w++) {
                const int reader = w * 64 + readers.lane[w];
                if (readers.tick[w] != 0 && reader != self && !ordered(warp, reader, readers.tick[w]))
                    return {true, false, false, thread_of(reader)};
            }
        }
        word.writer = self;
        word.write_tick = seen_[warp][warp];
        word.reader = 0;
        word.read_tick = 0;
    }
    return {};
}

void Races::start_copy(std::size_t offset, std::size_t bytes)
{
    for (Word& word : words(offset, bytes)) word.write_tick = never;
}

void Races::finish_copy(int thread, std::size_t offset, std::size_t bytes)
{
    for (Word& word : words(offset, bytes)) word.write_tick = seen_[thread / 32][thread / 32];
}

}  // namespace vimcore::shim
