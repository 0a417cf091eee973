// SPDX-License-Identifier: Apache-2.0
// JSON, safetensors (also hostile and failing), Config, image decoding and preprocessing without reference libraries.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "float_types.h"
#include "json.h"
#include "vimcore/config.h"
#include "vimcore/error.h"
#include "vimcore/image.h"
#include "vimcore/safetensors.h"

using namespace vimcore;
namespace fs = std::filesystem;

namespace {

// The message of the exception of type T that `run` throws; anything else fails the check.
template <class T>
std::string message_of(const std::function<void()>& run)
{
    try {
        run();
    } catch (const T& error) {
        return error.what();
    } catch (const std::exception& error) {
        return std::string("WRONG TYPE: ") + error.what();
    }
    return "NOTHING THROWN";
}

bool contains(const std::string& text, const std::string& part)
{
    if (text.find(part) != std::string::npos) return true;
    std::printf("'%s' is not in '%s'\n", part.c_str(), text.c_str());
    return false;
}

struct Folder {
    fs::path path;
    Folder()
    {
        std::string name = (fs::temp_directory_path() / "vimcore-test-XXXXXX").string();
        if (!::mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
        path = name;
    }
    ~Folder()
    {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
    std::size_t entries() const { return static_cast<std::size_t>(std::distance(fs::directory_iterator(path), {})); }
};

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

// ---- safetensors ---------------------------------------------------------------------------------------------------

std::string file_of(const std::string& header, std::size_t data = 16, std::int64_t length = -1)
{
    std::uint64_t size = length < 0 ? header.size() : static_cast<std::uint64_t>(length);
    std::string out;
    for (int i = 0; i < 8; ++i) out += static_cast<char>(size >> 8 * i);
    return out + header + std::string(data, '\7');
}

std::string parse_error(const std::string& bytes)
{
    return message_of<Error>([&] { SafetensorsFile::parse(bytes.data(), bytes.size(), "some.file"); });
}

std::string entry(const std::string& shape, const std::string& offsets, const std::string& dtype = "F32")
{
    return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

void test_safetensors_hostile()
{
    const std::string a = "\"a\":" + entry("[4]", "[0,16]");
    const std::pair<std::string, const char*> cases[] = {
        {"", "no header"},
        {"\1\0\0\0", "no header"},
        {file_of("{" + a + "}", 16, 1000000), "longer than the file"},
        {file_of("{" + a + "}", 16, std::numeric_limits<std::int64_t>::max()), "100 MB"},
        {file_of("[]", 0), "expected an object"},
        {file_of("{" + a + "," + a + "}"), "duplicate tensor name \"a\""},
        {file_of("{" + a + "}", 20), "belong to none"},
        {file_of("{" + a + "}", 15), "beyond"},
        {file_of("{\"a\":" + entry("[2]", "[0,8]") + ",\"b\":" + entry("[1]", "[12,16]") + "}"), "hole"},
        {file_of("{" + a + ",\"b\":" + entry("[2]", "[8,16]") + "}"), "overlaps"},
        {file_of("{" + a + ",\"b\":" + entry("[4]", "[0,16]") + "}"), "overlaps"},
        {file_of("{\"a\":" + entry("[4]", "[16,0]") + "}"), "reversed"},
        {file_of("{\"a\":" + entry("[-4]", "[0,16]") + "}"), "unsigned"},
        {file_of("{\"a\":" + entry("[4.0]", "[0,16]") + "}"), "expected an integer"},
        {file_of("{\"a\":" + entry("[4194305,4194305,211106198978564]", "[0,16]") + "}"), "overflows"},
        {file_of("{\"a\":" + entry("[0,9223372036854775807,9]", "[0,0]") + "}", 0), "overflows"},
        {file_of("{\"a\":" + entry("[1,1,1,1,1,1,1,1,4]", "[0,16]") + "}"), "more than 8 dimensions"},
        {file_of("{\"a\":" + entry("[4]", "[0,16]", "Q7") + "}"), "unsupported dtype \"Q7\""},
        {file_of("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"I32\",\"shape\":[4],\"data_offsets\":[0,16]}}"),
         "duplicate field"},
        {file_of("{\"__metadata__\":{\"x\":1}," + a + "}"), "expected a string"},
        {file_of("{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}"), "expected an object"},
        {file_of("{\"\xff\xfe\":" + entry("[4]", "[0,16]") + "}"), "invalid UTF-8"},
        {file_of("{\"" + std::string(5000, 'n') + "\":" + entry("[4]", "[0,16]") + "}"), "longer than 4096"},
    };
    for (const auto& [bytes, part] : cases) {
        const std::string error = parse_error(bytes);
        CHECK(contains(error, part));
        CHECK(contains(error, "some.file"));
    }
    const std::string odd = parse_error(file_of("{\"a\\n\\u0007\":" + entry("[4]", "[16,0]") + "}"));
    CHECK(contains(odd, "a\\x0a\\x07"));

    const std::string good = file_of("{\"u\":" + entry("[3]", "[0,3]", "U8") + ",\"z\":" + entry("[0,2]", "[3,3]") +
                                         ",\"f\":" + entry("[]", "[3,7]") + ",\"__metadata__\":{\"k\":\"v\"}}   ",
                                     7);
    const SafetensorsFile file = SafetensorsFile::parse(good.data(), good.size());
    CHECK(file.tensors().size() == 3 && file.tensors()[0].first == "u" && file.tensors()[2].first == "f");
    CHECK(file.metadata().at("k") == "v");
    CHECK(file.find("z")->numel() == 0 && file.find("z")->data != nullptr);
    CHECK(file.find("f")->shape.rank() == 0 && file.find("f")->bytes() == 4);
    CHECK(std::memcmp(file.find("f")->data, "\7\7\7\7", 4) == 0);
    CHECK(file.find("none") == nullptr);
}

// Any damage is either refused with vimcore::Error or yields views that lie within the bytes.
void test_safetensors_damage()
{
    const std::string good =
        file_of("{\"u\":" + entry("[3]", "[0,3]", "U8") + ",\"f\":" + entry("[2,1]", "[3,11]") + "}", 11);
    std::mt19937 generator(3);
    int refused = 0;
    for (int i = 0; i < 20000; ++i) {
        std::string bytes = good;
        for (int j = 0; j < 3; ++j) bytes[generator() % bytes.size()] = "0123456789[]{},:\"\0 -e"[generator() % 21];
        if (i % 4 == 0) bytes.resize(generator() % bytes.size());
        try {
            const SafetensorsFile file = SafetensorsFile::parse(bytes.data(), bytes.size());
            for (const auto& [name, tensor] : file.tensors()) {
                const char* begin = tensor.as<char>();
                CHECK(begin >= bytes.data() && begin + tensor.bytes() <= bytes.data() + bytes.size());
            }
        } catch (const Error&) {
            ++refused;
        }
    }
    CHECK(refused > 10000);
}

// A stream in pieces of any size, as from a pipe, gives what the same bytes in memory give; also its errors.
void test_safetensors_stream()
{
    std::vector<double> values(20000);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i);
    const Folder folder;
    const std::string path = (folder.path / "a.safetensors").string();
    save_safetensors(path, {{"v", {values.data(), {100, 200}, DType::f64, {}}}}, {{"k", "v"}});
    std::ifstream stream(path, std::ios::binary);
    const SafetensorsFile file = SafetensorsFile::read(stream, "a stream");
    CHECK(file.metadata().at("k") == "v");
    CHECK(file.find("v") && file.find("v")->shape == (Shape{100, 200}));
    CHECK(std::memcmp(file.find("v")->data, values.data(), values.size() * 8) == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(file.find("v")->data) % 64 == 0);
    const SafetensorsFile copy = file;  // shares the memory
    CHECK(copy.find("v")->data == file.find("v")->data);

    const auto stream_error = [](const std::string& bytes) {
        return message_of<Error>([&] {
            std::istringstream in(bytes);
            SafetensorsFile::read(in, "a stream");
        });
    };
    const std::string good = file_of("{\"a\":" + entry("[4]", "[0,16]") + "}");
    for (std::size_t size = 0; size < good.size(); ++size)
        CHECK(contains(stream_error(good.substr(0, size)), "[safetensors] a stream: "));
    CHECK(contains(stream_error(good + "x"), "belong to none"));
    CHECK(stream_error(good) == "NOTHING THROWN");

    struct Endless : std::streambuf {  // says that its header is long, and never ends
        char byte = '\x7f';
        std::size_t given = 0;
        int underflow() override
        {
            ++given;
            setg(&byte, &byte, &byte + 1);
            return byte;
        }
    } endless;
    std::istream in(&endless);
    CHECK(contains(message_of<Error>([&] { SafetensorsFile::read(in); }), "longer than 100 MB"));
    CHECK(endless.given == 8);
    std::ifstream nowhere(folder.path / "nowhere");
    CHECK(contains(message_of<Error>([&] { SafetensorsFile::read(nowhere); }), "no header"));
}

// Every type, written and read: names, shapes and bytes stay, every element is aligned.
void test_safetensors_types()
{
    const Folder folder;
    const std::string path = (folder.path / "a.safetensors").string();
    std::vector<unsigned char> bytes(8 * 6);
    std::mt19937 generator(11);
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(generator());
    std::vector<std::pair<std::string, Tensor>> tensors;
    for (int i = 0; i < dtype_count; ++i) {
        const auto dtype = static_cast<DType>(i);
        tensors.emplace_back(name_of(dtype), Tensor{bytes.data(), {2, 3}, dtype, {}});
        tensors.emplace_back(std::string(name_of(dtype)) + ".one", Tensor{bytes.data(), {}, dtype, {}});
    }
    save_safetensors(path, tensors, {});
    const SafetensorsFile file = SafetensorsFile::open(path);
    CHECK(file.tensors().size() == 2 * dtype_count);
    for (const auto& [name, tensor] : tensors) {
        const Tensor* found = file.find(name);
        CHECK(found && found->dtype == tensor.dtype && found->shape == tensor.shape);
        CHECK(found && std::memcmp(found->data, tensor.data, tensor.bytes()) == 0);
        CHECK(found && reinterpret_cast<std::uintptr_t>(found->data) % size_of(tensor.dtype) == 0);
    }
}

// Floats of 8 bits by the numbers of their definitions; all of both widths against each other where one holds the
// other.
void test_float_types()
{
    std::vector<unsigned char> bytes(256);
    for (std::size_t i = 0; i < 256; i++) bytes[i] = static_cast<unsigned char>(i);
    const auto values = [&](DType dtype) {
        std::vector<float> out(256);
        to_float({bytes.data(), {256}, dtype, {}}, out.data());
        return out;
    };
    const std::vector<float> e4m3 = values(DType::f8_e4m3), e5m2 = values(DType::f8_e5m2),
                             e4m3fnuz = values(DType::f8_e4m3fnuz), e5m2fnuz = values(DType::f8_e5m2fnuz);
    CHECK(e4m3[0x38] == 1 && e4m3[0x7e] == 448 && e4m3[1] == 0x1p-9f && e4m3[0xb8] == -1 && std::isnan(e4m3[0xff]));
    CHECK(e5m2[0x3c] == 1 && e5m2[0x7b] == 57344 && e5m2[1] == 0x1p-16f && std::isinf(e5m2[0x7c]));
    CHECK(std::isnan(e5m2[0xff]) && e5m2[0xfc] == -e5m2[0x7c]);
    CHECK(e4m3fnuz[0x40] == 1 && e4m3fnuz[0x7f] == 240 && e4m3fnuz[1] == 0x1p-10f && std::isnan(e4m3fnuz[0x80]));
    CHECK(e5m2fnuz[0x40] == 1 && e5m2fnuz[0x7f] == 57344 && e5m2fnuz[1] == 0x1p-17f && std::isnan(e5m2fnuz[0x80]));
    std::vector<unsigned char> halves(512, 0);  // e5m2 is the upper byte of f16
    for (std::size_t i = 0; i < 256; i++) halves[2 * i + 1] = static_cast<unsigned char>(i);
    std::vector<float> wide(256);
    to_float({halves.data(), {256}, DType::f16, {}}, wide.data());
    for (std::size_t i = 0; i < 256; i++) CHECK(e5m2[i] == wide[i] || (std::isnan(e5m2[i]) && std::isnan(wide[i])));
    CHECK(contains(message_of<std::invalid_argument>([&] { values(DType::c64); }), "c64"));
    CHECK(contains(message_of<std::invalid_argument>([&] { values(DType::u8); }), "u8"));
}

void test_safetensors_files()
{
    const Folder folder;
    const std::string path = (folder.path / "a.safetensors").string();
    std::vector<double> wide{1.5, -2.5};
    std::vector<float> narrow{1, 2, 3, 4, 5, 6};
    std::vector<std::uint8_t> bytes{7, 8, 9};
    const std::vector<std::pair<std::string, Tensor>> tensors{{"bytes", {bytes.data(), {3}, DType::u8, {}}},
                                                              {"narrow", {narrow.data(), {2, 3}, DType::f32, {}}},
                                                              {"none", {nullptr, {0, 4}, DType::f32, {}}},
                                                              {"wide", {wide.data(), {2}, DType::f64, {}}}};
    const std::map<std::string, std::string> metadata{{"k", "line\n\"quoted\""}, {"", "\xC3\xA9"}};
    save_safetensors(path, tensors, metadata);
    {
        const SafetensorsFile file = SafetensorsFile::open(path);
        CHECK(file.metadata() == metadata);
        CHECK(file.tensors().size() == 4);
        for (const auto& [name, tensor] : tensors) {
            const Tensor* found = file.find(name);
            CHECK(found && found->shape == tensor.shape && found->dtype == tensor.dtype);
            CHECK(found && (tensor.bytes() == 0 || std::memcmp(found->data, tensor.data, tensor.bytes()) == 0));
            CHECK(found && reinterpret_cast<std::uintptr_t>(found->data) % size_of(tensor.dtype) == 0);
        }
        narrow[0] = 99;
        save_safetensors(path, tensors, {});  // the reader keeps the old file
        CHECK(file.find("narrow")->as<float>()[0] == 1);
    }
    CHECK(SafetensorsFile::open(path).find("narrow")->as<float>()[0] == 99);
    CHECK(folder.entries() == 1);

    const auto write_error = [&](const fs::path& to) {
        return message_of<Error>([&] { save_safetensors(to.string(), tensors, metadata); });
    };
    CHECK(contains(write_error(folder.path / "missing" / "b.safetensors"), "No such file or directory"));
    CHECK(contains(write_error(folder.path / "missing" / "b.safetensors"), "b.safetensors"));
    fs::create_directory(folder.path / "target");
    CHECK(contains(write_error(folder.path / "target"), "cannot rename"));
    CHECK(folder.entries() == 2 && fs::is_empty(folder.path / "target"));
    if (::geteuid() != 0) {  // root writes anywhere
        ::chmod((folder.path / "target").c_str(), 0500);
        CHECK(contains(write_error(folder.path / "target" / "c"), "Permission denied"));
        ::chmod((folder.path / "target").c_str(), 0700);
    }
    CHECK(contains(write_error("/dev/full/x"), "Not a directory"));
    // A disk that fills up: the write fails half way, the old file stays, nothing is left behind.
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    rlimit limit;
    ::getrlimit(RLIMIT_FSIZE, &limit);
    const rlimit small{100, limit.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &small);
    const std::string full = write_error(path);
    ::setrlimit(RLIMIT_FSIZE, &limit);
    std::signal(SIGXFSZ, handler);
    CHECK(contains(full, "cannot write: File too large"));
    CHECK(SafetensorsFile::open(path).find("narrow")->as<float>()[0] == 99);
    CHECK(folder.entries() == 2);
    CHECK(contains(message_of<Error>([&] { SafetensorsFile::open(path + "x"); }), "No such file or directory"));
    CHECK(contains(message_of<Error>([&] { SafetensorsFile::open(folder.path.string()); }), "not a regular file"));

    const auto refuse = [&](const std::string& name, Tensor tensor) {
        return message_of<std::invalid_argument>([&] { save_safetensors(path, {{name, tensor}}, {}); });
    };
    CHECK(contains(refuse("__metadata__", tensors[0].second), "reserved"));
    CHECK(contains(refuse("\xff", tensors[0].second), "UTF-8"));
    CHECK(contains(refuse("gpu", {wide.data(), {2}, DType::f64, Device::cuda(0)}), "cuda:0"));
    CHECK(contains(refuse("null", {nullptr, {2}, DType::f64, {}}), "no data"));
    CHECK(contains(message_of<std::invalid_argument>([&] { save_safetensors(path, {tensors[0], tensors[0]}, {}); }),
                   "twice"));
    CHECK_THROWS(save_safetensors(path, tensors, {{"k", "\xff"}}), std::invalid_argument);
    CHECK(SafetensorsFile::open(path).find("narrow")->as<float>()[0] == 99);
    CHECK(folder.entries() == 2);
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
        "\"directions\": \"block\", \"average_directions\": false, \"class_token\": \"none\", \"pool\": \"all\", "
        "\"norm\": \"layer\", \"norm_eps\": 1e-06, \"pos_embed\": false, \"rope\": true, \"rope_residual\": true, "
        "\"rope_grid\": 7, \"layer_scale\": 0.1, \"drop_rate\": 0.25, \"drop_path_rate\": 0.5}";
    const Config config = Config::from_json(all);
    CHECK(config.to_json() == all);
    CHECK(config.img_height == 32 && config.img_width == 48 && config.grid_width() == 6 && config.patches() == 24);
    CHECK(config.rank() == 5 && config.inner() == 108 && config.class_position() == -1);
    CHECK(config.layer_scale == 0.1 && config.norm_eps == 1e-6 && config.direction_scale() == 1.0);

    for (const char* name : {"none", "sequence", "block", "ssm", "ssm_conv"})
        CHECK(contains(Config::from_json(std::string("{\"directions\": \"") + name + "\"}").to_json(), name));
    for (const char* name : {"none", "head", "double", "middle", "random"})
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

// ---- images --------------------------------------------------------------------------------------------------------

void test_images()
{
    const std::string text = "P6\n# two pixels\n2 1\n255\nabcdef";
    const Image image = decode_image(text.data(), text.size(), "a.ppm");
    CHECK(image.height == 1 && image.width == 2 && std::memcmp(image.pixels.data(), "abcdef", 6) == 0);
    const std::string grey = "P5 2 1 255 ab";
    CHECK(std::memcmp(decode_image(grey.data(), grey.size(), "a.pgm").pixels.data(), "aaabbb", 6) == 0);
    for (const std::string bad :
         {"", "P6", "P6 2 1 255 abcde", "P6 2 1 65535 abcdefabcdef", "P6 0 1 255 ", "GIF89a",
          "P6 99999999 99999999 255 a", "\xFF\xD8\xFF", "\x89PNG\r\n\x1A\n", "\x89PNG\r\n\x1A\n1234567"})
        CHECK(contains(message_of<Error>([&] { decode_image(bad.data(), bad.size(), "bad.file"); }), "bad.file: "));

    const Folder folder;
    const std::string path = (folder.path / "a.ppm").string();
    std::ofstream(path, std::ios::binary) << text;
    CHECK(decode_image(path).pixels == image.pixels);
    CHECK(contains(message_of<Error>([&] { decode_image(path + "x"); }), "a.ppmx"));
    CHECK(contains(message_of<Error>([&] { decode_image(folder.path.string()); }), "not a regular file"));

    Image flat{5, 7, std::vector<std::uint8_t>(105, 200)};
    for (const std::uint8_t value : resize_bicubic(flat, 11, 3).pixels) CHECK(value == 200);
    CHECK(resize_bicubic(image, 1, 2).pixels == image.pixels);
    CHECK_THROWS(resize_bicubic(flat, 0, 3), std::invalid_argument);
    flat.pixels.pop_back();
    CHECK_THROWS(resize_bicubic(flat, 3, 3), std::invalid_argument);
}

void test_preprocess()
{
    Preprocess options;
    CHECK(Preprocess::from_json(options.to_json()).to_json() == options.to_json());
    CHECK(Preprocess::from_json("{\"resize\": 8, \"crop\": [4, 6], \"mean\": [0.5], \"std\": [0.25]}").to_json() ==
          "{\"resize\": 8, \"crop\": [4, 6], \"mean\": [0.5], \"std\": [0.25], \"interpolation\": \"bicubic\"}");
    CHECK_THROWS(Preprocess::from_json("{\"interpolation\": \"nearest\"}"), std::invalid_argument);
    CHECK_THROWS(Preprocess::from_json("{\"crops\": 3}"), std::invalid_argument);
    CHECK_THROWS(Preprocess::from_json("{\"mean\": [0.5]}"), std::invalid_argument);

    // Without resizing: crop, padding, order of planes, and the arithmetic of one pixel.
    Image image{2, 3, {}};
    for (int i = 0; i < 18; ++i) image.pixels.push_back(static_cast<std::uint8_t>(10 * i));
    options = {.resize = 0, .crop_height = 4, .crop_width = 1, .mean = {0, 0.5, 0}, .std = {1, 0.25, 1}};
    std::vector<float> out(12, -1);
    preprocess(image, options, out.data());
    const float zero[3] = {0.0f, -2.0f, 0.0f};
    for (int c = 0; c < 3; ++c) {
        const auto pixel = [&](int y) {
            const float value = static_cast<float>(10 * (9 * y + 3 + c)) / 255.0f;
            return c == 1 ? (value - 0.5f) / 0.25f : value;
        };
        CHECK(out[4 * c] == zero[c] && out[4 * c + 3] == zero[c]);
        CHECK(out[4 * c + 1] == pixel(0) && out[4 * c + 2] == pixel(1));
    }
    options = {.resize = 0, .crop_height = 1, .crop_width = 1, .mean = {0}, .std = {1}};
    image = {1, 1, {255, 0, 0}};
    preprocess(image, options, out.data());
    CHECK(out[0] == 76.0f / 255.0f);
    options.std[0] = 0;
    CHECK_THROWS(preprocess(image, options, out.data()), std::invalid_argument);
}

}  // namespace

int main()
{
    test_json_values();
    test_json_errors();
    test_json_writing();
    test_safetensors_hostile();
    test_safetensors_damage();
    test_safetensors_stream();
    test_safetensors_types();
    test_float_types();
    test_safetensors_files();
    test_config_json();
    test_config_tokens();
    test_config_flops();
    test_images();
    test_preprocess();
    return check_failures();
}
