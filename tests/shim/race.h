// SPDX-License-Identifier: Apache-2.0
// Race detection for shared memory. Every barrier includes whole warps, so clocks are kept per warp: ticks[w] counts
// the barriers of warp w, and seen[w][v] is the tick of v before which all accesses of v are ordered before what w does
// now. For every two bytes the last write and the reads since are remembered; an access conflicts with one by another
// thread that its warp has not seen. A shuffle orders nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace vimcore::shim {

class Races {
public:
    struct Conflict {
        bool found = false, pending = false,
             write = false;  // with what: a copy that has not been waited for, or a write
        int thread = 0;
    };

    void start_launch(std::size_t bytes) { bytes_ = bytes, shift_ = 2; }
    void start_block(int warps);      // everything before is ordered
    void order_all();                 // a barrier of the whole block
    void order(std::uint32_t warps);  // a barrier of these warps

    Conflict read(int thread, std::size_t offset, std::size_t bytes)
    {
        const int warp = thread / 32;
        const std::uint16_t self = name(thread);
        for (Word& word : words(offset, bytes)) {
            if (conflicts(word, warp, self)) return {true, word.write_tick == never, true, thread_of(word.writer)};
            if (word.reader == self)
                word.read_tick = seen_[warp][warp];
            else
                add_reader(word, warp, self);
        }
        return {};
    }
    Conflict write(int thread, std::size_t offset, std::size_t bytes);
    void start_copy(std::size_t offset, std::size_t bytes);  // after write(): pending until finish_copy
    void finish_copy(int thread, std::size_t offset, std::size_t bytes);

private:
    static constexpr std::uint16_t several = 32;   // in place of the lane: more than one lane of that warp
    static constexpr std::uint16_t many = 0xffff;  // in place of the thread: readers of more than one warp, see Readers
    static constexpr std::uint32_t never = 0xffffffff;  // tick of a copy that is under way

    struct Word {
        std::uint32_t write_tick = 0, read_tick = 0;
        std::uint16_t writer = 0, reader = 0;  // warp * 64 + lane
        std::uint32_t readers = 0;             // index of Readers, 0: none yet
    };
    struct Readers {
        std::array<std::uint32_t, 32> tick{};
        std::array<std::uint16_t, 32> lane{};
    };

    static std::uint16_t name(int thread) { return static_cast<std::uint16_t>(thread / 32 * 64 + thread % 32); }
    static int thread_of(int name) { return name / 64 * 32 + (name % 64 == several ? 0 : name % 64); }
    bool ordered(int warp, int name, std::uint32_t tick) const { return tick < seen_[warp][name / 64]; }
    bool conflicts(const Word& word, int warp, std::uint16_t self) const
    {
        return !ordered(warp, word.writer, word.write_tick) && (word.writer != self || word.write_tick == never);
    }
    void add_reader(Word& word, int warp, std::uint16_t self);
    Readers& readers_of(Word& word);
    void refine();
    std::span<Word> words(std::size_t offset, std::size_t bytes)
    {
        if (((offset | bytes) & 3) != 0 && shift_ == 2) refine();
        return {words_[shift_].data() + (offset >> shift_), bytes >> shift_};
    }

    std::size_t bytes_ = 0;
    int warps_ = 0, shift_ = 2;
    std::uint32_t epoch_ = 0;  // barriers of the whole block so far
    std::array<std::array<std::uint32_t, 32>, 32> seen_{};
    std::vector<Word> words_[3];  // of 2^shift bytes
    std::vector<Readers> readers_;
};

}  // namespace vimcore::shim
