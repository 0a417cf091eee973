// SPDX-License-Identifier: Apache-2.0
// The checksum that tells whether weights were written to: every bit of every word, on every instruction set this
// machine can run, whatever the threads; changes that a plain sum would not see.
#include "vimcore/checksum.h"

#include <bit>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "isa.h"

using namespace vimcore;

namespace {

std::mt19937 generator(3);

std::vector<float> random(std::size_t size)
{
    std::normal_distribution<float> draw;
    std::vector<float> values(size);
    for (float& value : values) value = draw(generator);
    return values;
}

Tensor view(std::vector<float>& values)
{
    return {values.data(), {static_cast<std::int64_t>(values.size())}, DType::f32, Device::cpu()};
}

using State = std::vector<unsigned>;

State of(const std::string& isa, const std::vector<unsigned>& words)
{
    State state(static_cast<std::size_t>(cpu::checksum_lanes), 1u);
    cpu::kernels<float>(isa).checksum(words.data(), static_cast<cpu::Index>(4 * words.size()), state.data());
    return state;
}

void test_kernel(const std::string& isa)
{
    for (const std::size_t size : {0u, 1u, 5u, 63u, 64u, 65u, 127u, 128u, 200u}) {
        std::vector<unsigned> words(size);
        for (unsigned& word : words) word = generator();
        const State before = of(isa, words);
        State expected(before.size(), 1u);
        for (std::size_t i = 0; i < (size + 63) / 64 * 64; i++) {
            unsigned& lane = expected[i % 64];
            lane = std::rotl(lane ^ (i < size ? words[i] : 0u), 13) * 0x9e3779b1u;
        }
        CHECK(before == expected);
        for (std::size_t i = 0; i < size; i++)
            for (int bit = 0; bit < 32; bit++) {
                words[i] ^= 1u << bit;
                CHECK(of(isa, words) != before);
                words[i] ^= 1u << bit;
            }
    }
}

void test_changes()
{
    // Several tasks and tensors; the last one ends with part of a vector.
    std::vector<float> a = random(150000), b = random(64), c = random(777);
    const std::vector<Tensor> tensors{view(a), Tensor{}, view(b), view(c)};
    const Checksum checksum(tensors);
    Context one(Device::cpu(), 1), two(Device::cpu(), 2), five(Device::cpu(), 5);
    const std::uint64_t before = checksum(one);
    CHECK(checksum(one) == before);
    CHECK(checksum(two) == before);
    CHECK(checksum(five) == before);

    std::set<std::uint64_t> seen{before};
    const auto changed = [&] { return seen.insert(checksum(two)).second; };
    for (std::vector<float>* values : {&a, &b, &c})
        for (int i = 0; i < 40; i++) {
            float& value = (*values)[generator() % values->size()];
            const float was = std::exchange(value, value + 1e-6f * (value < 0 ? -1 : 1));
            CHECK(value == was || checksum(two) != before);
            value = was;
            CHECK(checksum(two) == before);
        }
    for (std::vector<float>* values : {&a, &b, &c}) {
        for (float& value : *values) value = -value;  // an even number of top bits in every lane
        CHECK(changed());
    }
    for (const std::size_t apart : {1u, 63u, 64u, 65u, 4096u, 65536u, 131072u}) {
        std::swap(a[17], a[17 + apart]);
        CHECK(changed());
    }
    std::swap(b[0], c[0]);
    CHECK(changed());
    for (float& value : a) value *= 2;  // exponents move together
    CHECK(changed());

    CHECK(Checksum({})(two) == Checksum({})(one));
    std::vector<double> wide{1, 2, 3};
    const Tensor doubles{wide.data(), {3}, DType::f64, Device::cpu()};
    const Checksum of_doubles(std::vector<Tensor>{doubles});
    const std::uint64_t first = of_doubles(one);
    wide[2] += 1e-15;
    CHECK(of_doubles(one) != first);
}

}  // namespace

int main()
{
    for (const std::string& isa : cpu::isas_of_float()) test_kernel(isa);
    test_changes();
    return check_failures();
}
