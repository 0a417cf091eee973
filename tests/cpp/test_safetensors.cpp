// SPDX-License-Identifier: Apache-2.0
// safetensors: hostile and damaged files, streams, every type, writing.
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "files.h"
#include "files/float_types.h"
#include "vimcore/error.h"
#include "vimcore/safetensors.h"

using namespace vimcore;
namespace fs = std::filesystem;

namespace {

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
        {"", "an empty file"},
        {"\1\0\0\0", "no header"},
        {file_of("{" + a + "}", 16, 1000000), "longer than the file"},
        {file_of("{" + a + "}", 0, static_cast<std::int64_t>(a.size()) + 3), "longer than the file"},
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
    CHECK(endless.given == 512);  // enough to tell what it is instead
    std::ifstream nowhere(folder.path / "nowhere");
    CHECK(contains(message_of<Error>([&] { SafetensorsFile::read(nowhere); }), "an empty file"));
}

// What people give by mistake is named, with what to do about it: from a file, a stream and memory.
void test_safetensors_foreign()
{
    const std::pair<std::string, const char*> cases[] = {
        {"", "an empty file"},
        {"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 29000000\n", "git lfs pull"},
        {"<!DOCTYPE html>\n<html>", "download the file itself"},
        {"\xef\xbb\xbf\n  <HTML lang=en>", "download the file itself"},
        {std::string("PK\3\4\0\0\x08\x08\0\0", 10), "`vimcore convert`"},
        {"\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.", "`vimcore convert`"},
        {"\x89HDF\r\n\x1a\n\1\1\1\1", "HDF5"},
        {"\x93NUMPY\1\1v\1{'descr'", "numpy"},
        {"404: Not Found", "text that begins with \"404: Not Found\""},
        {"\x1f\x8b\x08\x08\1\2\3\4\5", "gzip"},
        {"\x01\x02\x03\x04\x05\x06\x07\x08\x09", "longer than 100 MB"},  // nothing known
    };
    const Folder folder;
    const std::string path = folder.file("a.safetensors");
    for (const auto& [bytes, part] : cases) {
        std::ofstream(path, std::ios::binary) << bytes;
        const std::string message = message_of<Error>([&] { SafetensorsFile::open(path); });
        CHECK(contains(message, part));
        CHECK(contains(message, path));
        CHECK(message.find('\n') == std::string::npos);
        std::istringstream stream(bytes);
        CHECK(contains(message_of<Error>([&] { SafetensorsFile::read(stream); }), part));
        CHECK(contains(parse_error(bytes), part));
    }
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
    const fs::path pipe = folder.path / "pipe";
    CHECK(::mkfifo(pipe.c_str(), 0600) == 0);
    CHECK(contains(write_error(pipe), "pipe: a device, pipe or socket"));
    CHECK(fs::is_fifo(pipe) && folder.entries() == 3);
    fs::remove(pipe);
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

}  // namespace

int main()
{
    test_safetensors_hostile();
    test_safetensors_damage();
    test_safetensors_stream();
    test_safetensors_foreign();
    test_safetensors_types();
    test_float_types();
    test_safetensors_files();
    return check_failures();
}
