// SPDX-License-Identifier: Apache-2.0
// JSON: what is read, refused and written; Config: its JSON, tokens and multiply-adds.
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "files.h"
#include "files/json.h"
#include "vimcore/params.h"

using namespace vimcore;

namespace {

// ---- JSON ----------------------------------------------------------------------------------------------------------

std::string json_error(const std::string& text)
{
    return message_of<json::ParseError>([&] { json::parse(text); });
}

void test_json_values()
{
    const json::Value root =
        json::parse(" {\"a\": [1, -2.5e1, true, false, null, \"x\\u00e9\\ud83d\\ude00\\n\"], \"b\": {}} \n");
    CHECK(root.keys == (std::vector<std::string>{"a", "b"}));
    const json::Value& list = *root.find("a");
    CHECK(list.items.size() == 6);
    CHECK(list.items[0].as_integer("x") == 1);
    CHECK(list.items[1].as_real("x") == -25.0);
    CHECK(list.items[2].as_boolean("x") && !list.items[3].as_boolean("x"));
    CHECK(list.items[4].kind == json::Kind::null);
    CHECK(list.items[5].as_string("x") == "x\xC3\xA9\xF0\x9F\x98\x80\n");
    CHECK(root.find("c") == nullptr);
    CHECK(contains(message_of<std::invalid_argument>([&] { list.items[1].as_integer("depth"); }),
                   "depth: expected an integer, got a number"));
    CHECK(json::parse("9223372036854775807").as_integer("x") == std::numeric_limits<std::int64_t>::max());
    CHECK(json::parse("-9223372036854775808").as_integer("x") == std::numeric_limits<std::int64_t>::min());
    CHECK(json::parse("1.0").kind == json::Kind::real && json::parse("1e0").kind == json::Kind::real);
    CHECK(json::parse("-0").kind == json::Kind::integer);
}

void test_json_errors()
{
    const std::pair<const char*, const char*> cases[] = {
        {"", "end of text at line 1, column 1 (byte 0)"},
        {"[1,\n 2,\n  x]", "unexpected character 'x' at line 3, column 3 (byte 10)"},
        {"[1,]", "unexpected character ']'"},
        {"[1 2]", "expected ',' or ']'"},
        {"{\"a\" 1}", "expected ':'"},
        {"{a: 1}", "unexpected character 'a'"},
        {"{1: 1}", "expected a string"},
        {"[", "end of text"},
        {"{\"a\": 1, \"a\": 2}", "duplicate key \"a\""},
        {"{\"a\": 1, \"\\u0061\": 2}", "duplicate key \"a\""},
        {"01", "start with 0"},
        {"-", "expected a digit"},
        {"1.", "expected a digit"},
        {"1e", "expected a digit"},
        {"+1", "unexpected character '+'"},
        {".5", "unexpected character '.'"},
        {"NaN", "unexpected character 'N'"},
        {"9223372036854775808", "integer out of range"},
        {"1e999", "number out of range"},
        {"nul", "expected null"},
        {"truth", "expected true"},
        {"true false", "unexpected text after the value"},
        {"\"abc", "end of text in a string"},
        {"\"\\q\"", "unknown escape"},
        {"\"\\u12g4\"", "hexadecimal"},
        {"\"\\ud800\"", "unpaired surrogate"},
        {"\"\\udc00\"", "unpaired surrogate"},
        {"\"\\ud800\\u0041\"", "unpaired surrogate"},
        {"\"a\nb\"", "control character"},
        {"\"\xff\"", "invalid UTF-8"},
        {"\"\xc0\x80\"", "invalid UTF-8"},
        {"\"\xed\xa0\x80\"", "invalid UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "invalid UTF-8"},
        {"\"\xe2\x82\"", "invalid UTF-8"},
        {"\xff", "unexpected character '\\xff'"}};
    for (const auto& [text, part] : cases) CHECK(contains(json_error(text), part));
    const std::string deep(100000, '[');
    CHECK(contains(json_error(deep), "nested deeper than 16"));
    CHECK(json::parse(std::string(16, '[') + std::string(16, ']')).items.size() == 1);
    CHECK(contains(json_error(std::string(17, '[') + std::string(17, ']')), "nested deeper"));
    CHECK(contains(message_of<json::ParseError>([] { json::parse("[1, 2, 3]", 16, 3); }), "too many values"));
}

void test_json_writing()
{
    CHECK(json::quote("a\"\\\n\t\x01\x7f\xC3\xA9") == "\"a\\\"\\\\\\n\\t\\u0001\\u007f\xC3\xA9\"");
    CHECK_THROWS(json::quote("\xff"), std::invalid_argument);
    CHECK(json::number(1.0) == "1.0");
    CHECK_THROWS(json::number(std::numeric_limits<double>::infinity()), std::invalid_argument);
    std::mt19937_64 generator(5);
    for (int i = 0; i < 1000; ++i) {
        const std::uint64_t bits = generator();
        double value;
        std::memcpy(&value, &bits, sizeof value);
        if (!std::isnormal(value)) continue;
        const json::Value back = json::parse(json::number(value));
        CHECK(back.kind == json::Kind::real && back.number.real == value);
    }
    std::string every;
    for (int c = 0; c < 128; ++c) every += static_cast<char>(c);
    CHECK(json::parse(json::quote(every)).string == every);
    CHECK(json::printable("a\n\xff\xC3\xA9", 100) == "a\\x0a\\xff\xC3\xA9");
    CHECK(json::printable(std::string(500, 'x'), 10) == "xxxxxxxxxx...");
    CHECK(json::printable("abcdefghi\xC3\xA9", 10) == "abcdefghi...");
}

// ---- Config --------------------------------------------------------------------------------------------------------

std::string config_error(const std::string& text)
{
    return message_of<std::invalid_argument>([&] { Config::from_json(text); });
}

void test_config_json()
{
    const std::string defaults = Config{}.to_json();
    CHECK(Config::from_json("{}").to_json() == defaults);
    CHECK(Config::from_json(defaults).to_json() == defaults);
    const std::string all =
        "{\"img_size\": [32, 48], \"patch_size\": 8, \"stride\": 8, \"in_chans\": 1, \"num_classes\": 0, "
        "\"embed_dim\": 36, \"depth\": 2, \"d_state\": 8, \"d_conv\": 3, \"expand\": 3, \"dt_rank\": 5, "
        "\"directions\": \"block\", \"average_directions\": false, \"class_token\": \"none\", \"registers\": null, "
        "\"neck_reduction\": 1, \"pool\": \"all\", \"norm\": \"layer\", \"norm_eps\": 1e-06, \"pos_embed\": false, "
        "\"rope\": true, \"rope_residual\": true, "
        "\"rope_grid\": 7, \"layer_scale\": 0.1, \"drop_rate\": 0.25, \"drop_path_rate\": 0.5, "
        "\"frames\": null}";
    const Config config = Config::from_json(all);
    CHECK(config.to_json() == all);
    CHECK(config.img_height == 32 && config.img_width == 48 && config.grid_width() == 6 && config.patches() == 24);
    CHECK(config.rank() == 5 && config.inner() == 108 && config.class_position() == -1);
    CHECK(config.layer_scale == 0.1 && config.norm_eps == 1e-6 && config.direction_scale() == 1.0);

    for (const char* name : {"none", "sequence", "block", "ssm", "ssm_conv"})
        CHECK(contains(Config::from_json(std::string("{\"directions\": \"") + name + "\"}").to_json(), name));
    for (const char* name : {"none", "head", "double", "middle", "random", "registers"})
        CHECK(contains(Config::from_json(std::string("{\"class_token\": \"") + name + "\"}").to_json(), name));
    CHECK(Config::from_json("{\"img_size\": 64}").img_width == 64);
    CHECK(Config::from_json("{\"patch_size\": 32}").stride == 32);
    CHECK(Config::from_json("{\"patch_size\": 32, \"stride\": null}").stride == 32);
    CHECK(Config::from_json("{\"patch_size\": 32, \"stride\": 8}").stride == 8);
    CHECK(Config::from_json("{\"dt_rank\": \"auto\", \"embed_dim\": 200}").rank() == 13);
    CHECK(Config::from_json("{\"layer_scale\": 1}").layer_scale == 1.0);

    const std::pair<const char*, const char*> cases[] = {
        {"[]", "expected an object"},
        {"{\"depht\": 3}", "unknown option \"depht\""},
        {"{\"depth\": 3, \"depth\": 3}", "duplicate key"},
        {"{\"depth\": 3.0}", "depth: expected an integer"},
        {"{\"depth\": \"3\"}", "depth: expected an integer"},
        {"{\"depth\": true}", "depth: expected an integer"},
        {"{\"depth\": 0}", "depth: expected 1 to"},
        {"{\"rope\": 1}", "rope: expected a boolean"},
        {"{\"img_size\": [1, 2, 3]}", "img_size: expected an integer or"},
        {"{\"img_size\": [16, 15]}", "smaller than a patch"},
        {"{\"img_size\": 15}", "smaller than a patch"},
        {"{\"img_size\": 1048577}", "img_size height"},
        {"{\"img_size\": 1048576, \"patch_size\": 1}", "tokens"},
        {"{\"stride\": 0}", "stride: expected 1 to"},
        {"{\"stride\": 17}", "stride: expected at most patch_size, 16, got 17"},
        {"{\"patch_size\": 8, \"stride\": 16}", "stride: expected at most patch_size, 8, got 16"},
        {"{\"num_classes\": -1}", "num_classes"},
        {"{\"dt_rank\": 0}", "dt_rank"},
        {"{\"dt_rank\": \"all\"}", "dt_rank"},
        {"{\"embed_dim\": 9223372036854775807}", "embed_dim"},
        {"{\"directions\": \"v2\"}", "expected one of \"none\", \"sequence\""},
        {"{\"directions\": \"block\", \"depth\": 3}", "even depth"},
        {"{\"norm_eps\": 0}", "norm_eps"},
        {"{\"drop_rate\": 1}", "drop_rate"},
        {"{\"drop_path_rate\": -0.1}", "drop_path_rate"},
        {"{\"rope\": true}", "class_token"},
        {"{\"rope\": true, \"class_token\": \"head\", \"stride\": 8}", "stride"},
        {"{\"rope\": true, \"class_token\": \"head\", \"embed_dim\": 190}", "divisible by 4"},
        {"{\"rope_residual\": true}", "needs rope"},
        {"{\"rope\": true, \"class_token\": \"registers\"}", "class_token"},
        {"{\"registers\": 12}", "registers: needs class_token \"registers\", got \"middle\""},
        {"{\"registers\": 0}", "registers: expected at least 1"},
        {"{\"class_token\": \"registers\", \"registers\": 196}", "expected 1 to 195, fewer than the patches"},
        {"{\"class_token\": \"registers\", \"registers\": 65537}", "registers"},
        {"{\"neck_reduction\": 2}", "neck_reduction: needs class_token"},
        {"{\"class_token\": \"registers\", \"neck_reduction\": 5}", "neck_reduction: expected a divisor"},
        {"{\"class_token\": \"registers\", \"neck_reduction\": 0}", "neck_reduction: expected 1 to"},
        {"{\"frames\": 0}", "frames: expected at least 1"},
        {"{\"frames\": 65537}", "frames"},
        {"{\"frames\": 8, \"stride\": 8}", "frames: needs stride equal to patch_size"},
        {"{\"frames\": 8, \"img_size\": [224, 230]}", "expected multiples of patch_size, 16, got 224 x 230"},
        {"{\"frames\": 8, \"class_token\": \"random\"}", "does not go with class_token"},
        {"{\"frames\": 8, \"class_token\": \"head\", \"rope\": true}", "does not go with rope"},
        {"{\"frames\": 65536, \"img_size\": 1048576}", "tokens"},
    };
    for (const auto& [text, part] : cases) CHECK(contains(config_error(text), part));

    Config bad;
    bad.norm_eps = std::numeric_limits<double>::quiet_NaN();
    CHECK_THROWS(bad.validate(), std::invalid_argument);
    bad = {};
    bad.layer_scale = std::numeric_limits<double>::infinity();
    CHECK_THROWS(bad.validate(), std::invalid_argument);
    bad = {};
    bad.pool = static_cast<Pool>(9);
    CHECK_THROWS(bad.validate(), std::invalid_argument);
}

void test_config_tokens()
{
    Config config;
    CHECK(config.patches() == 196 && config.tokens() == 197 && config.class_position() == 98);
    CHECK(config.direction_scale() == 0.5 && config.two_directions());
    config.stride = 8;
    CHECK(config.patches() == 729 && config.class_position() == 364);
    config.class_token = ClassToken::double_;
    CHECK(config.tokens() == 731 && config.class_position() == 0);
    config.class_token = ClassToken::random;
    CHECK(config.tokens() == 730 && config.class_position() == 0);
    config.class_token = ClassToken::registers;
    config.registers = 12;
    config.neck_reduction = 4;
    CHECK(config.tokens() == 741 && config.class_position() == 56 && config.class_places().at(11) == 56 + 11 * 57);
    CHECK(config.readout_width() == 576);
    config.registers = 0;
    config.neck_reduction = 1;
    config.class_token = ClassToken::none;
    CHECK(config.tokens() == 729 && config.class_position() == -1);
    config.directions = Directions::ssm;
    CHECK(config.direction_scale() == 1.0);
    config.directions = Directions::ssm_conv;
    config.average_directions = false;
    CHECK(config.direction_scale() == 1.0);
    config.img_height = config.img_width = 1248;
    config.stride = 16;
    CHECK(config.patches() == 6084);
}

void test_config_shapes()
{
    Config config;
    CHECK(!config.head_per_token() && config.logits_shape(3) == Shape({3, 1000}));
    CHECK(config.images_shape(2) == Shape({2, 3, 224, 224}) && config.tokens_shape(2) == Shape({2, 197, 192}));
    config.pool = Pool::all;  // says nothing beside a class token
    CHECK(!config.head_per_token() && config.logits_shape(3) == Shape({3, 1000}));
    config.class_token = ClassToken::none;
    CHECK(config.head_per_token() && config.logits_shape(3) == Shape({3, 196, 1000}));
    config.pool = Pool::max;
    CHECK(config.head_per_token() && config.logits_shape(3) == Shape({3, 1000}));
    config.num_classes = 0;
    CHECK(config.outputs() == 192 && config.logits_shape(3) == Shape({3, 192}));
    for (const Pool pool : {Pool::mean, Pool::last}) {
        config.pool = pool;
        CHECK(!config.head_per_token() && config.logits_shape(1) == Shape({1, 192}));
    }
}

void test_config_options()
{
    Config config = Config::from_json("{\"depth\": 2, \"layer_scale\": 0.5, \"img_size\": [32, 48]}");
    CHECK(Config::from_options(config.options()) == config && Config{} != config);
    CHECK(Config::from_options({}) == Config{});
    CHECK(Config::from_options({{"patch_size", std::int64_t{8}}}).stride == 8);
    const auto error = [](const Options& options) {
        return message_of<std::invalid_argument>([&] { Config::from_options(options); });
    };
    CHECK(contains(error({{"depth", 2.0}}), "[config] depth: expected an integer"));
    CHECK(contains(error({{"depths", std::int64_t{2}}}), "unknown option \"depths\""));
    CHECK(contains(error({{"depth", std::int64_t{0}}}), "[config] depth: expected 1 to"));

    // Names and shapes of one block, alone and among those of the network.
    std::vector<std::pair<std::string, Shape>> all, own;
    for_each_param(config, [&](const std::string& name, const Shape& shape) {
        if (name.starts_with("layers.1.")) all.emplace_back(name.substr(9), shape);
    });
    BlockParams none;
    for_each_param(config, none,
                   [&](const std::string& name, Tensor&, const Shape& shape) { own.emplace_back(name, shape); });
    CHECK(all == own && own.size() == 18);
}

// The published table: multiply-adds in units of 10^9.
void test_config_flops()
{
    const struct {
        std::int64_t size, stride, tokens;
        double tiny, small, base, digits;
    } rows[] = {{224, 16, 197, 1.525, 5.316, 19.70, 0.0005},
                {224, 8, 730, 5.65, 19.70, 72.98, 0.005},
                {512, 16, 1025, 7.94, 27.66, 102.5, 0.005},
                {1024, 16, 4097, 31.7, 110.6, 409.6, 0.05},
                {1248, 16, 6085, 47.1, 164.2, 608.3, 0.05}};
    for (const auto& row : rows) {
        Config config;
        config.img_height = config.img_width = row.size;
        config.stride = row.stride;
        CHECK(config.tokens() == row.tokens);
        CHECK_CLOSE(static_cast<double>(config.flops()) / 1e9, row.tiny, row.digits);
        config.embed_dim = 384;
        CHECK_CLOSE(static_cast<double>(config.flops()) / 1e9, row.small, row.size == 224 ? 0.005 : 0.05);
        config.embed_dim = 768;
        CHECK_CLOSE(static_cast<double>(config.flops()) / 1e9, row.base,
                    row.stride == 8 || row.size == 224 ? 0.006 : 0.06);
    }
    // The parts, exactly: 24 layers of 197 tokens, D 192, E 384, N 16, R 12, K 4.
    const std::int64_t linear = 3 * 384 * 192 + 2 * (4 * 384 + 44 * 384 + 12 * 384), scan = 2 * 4 * 384 * 16;
    CHECK(Config{}.flops() == 197 * 24 * (linear + scan) + 196 * 768 * 192 + 1000 * 192);
    Config config;
    const std::int64_t full = config.flops();
    config.num_classes = 0;
    CHECK(full - config.flops() == 192000);
    config.directions = Directions::ssm;  // shares conv and projections, scans twice
    CHECK(config.flops() == 197 * 24 * (linear - 60 * 384 + scan) + 196 * 768 * 192);
    config.directions = Directions::none;
    CHECK(config.flops() == 197 * 24 * (linear - 60 * 384 + scan / 2) + 196 * 768 * 192);
    config.num_classes = 1000;
    config.class_token = ClassToken::none;
    const std::int64_t mean = config.flops();
    config.pool = Pool::all;  // head at every token
    CHECK(config.flops() - mean == 195 * 192000);
}

}  // namespace

int main()
{
    test_json_values();
    test_json_errors();
    test_json_writing();
    test_config_json();
    test_config_tokens();
    test_config_shapes();
    test_config_options();
    test_config_flops();
    return check_failures();
}
