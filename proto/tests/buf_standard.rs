//! The rules that buf calls STANDARD and COMMENTS, for machines without buf. Where buf is at hand CI
//! runs `buf lint` as well (`proto/buf.yaml`).
#![allow(clippy::unwrap_used, reason = "a test helper fails as its test does")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use prost::Message as _;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
};
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver, IncludeFileResolver};
use shootdown_proto::v1::FILE_DESCRIPTOR_SET;

#[test]
fn the_protocol_keeps_the_standard_rules_and_everything_has_a_comment() {
    let found = violations(&compile(IncludeFileResolver::new("proto".into()), &files()));
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn every_proto_file_is_compiled_and_served_by_reflection() {
    let served = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let served: BTreeSet<_> = served.file.iter().map(|file| file.name().to_owned()).collect();
    let missing: Vec<_> = files().into_iter().filter(|file| !served.contains(file)).collect();
    assert!(missing.is_empty(), "build.rs does not name {missing:?}");
}

#[test]
fn each_rule_is_broken_by_what_it_forbids() {
    for (rule, name, body) in BROKEN {
        let head = "syntax = \"proto3\";\npackage shootdown.v1;\n";
        let source = if body.starts_with("syntax") { (*body).to_owned() } else { format!("{head}{body}") };
        let found = violations(&compile(Text { name, source }, &[(*name).to_owned()]));
        assert!(found.iter().any(|(broken, _)| broken == rule), "{rule} does not see {body:?}: {found:?}");
    }
}

const V1: &str = "shootdown/v1/a.proto";

/// A rule, and a file that breaks it.
const BROKEN: &[(&str, &str, &str)] = &[
    ("PACKAGE_DIRECTORY_MATCH", "shootdown/v2/a.proto", ""),
    ("FILE_LOWER_SNAKE_CASE", "shootdown/v1/aFile.proto", ""),
    ("PACKAGE_LOWER_SNAKE_CASE", "Shootdown/v1/a.proto", "syntax = \"proto3\";\npackage Shootdown.v1;\n"),
    ("PACKAGE_VERSION_SUFFIX", "shootdown/a.proto", "syntax = \"proto3\";\npackage shootdown;\n"),
    ("PACKAGE_DEFINED", "a.proto", "syntax = \"proto3\";\n"),
    ("SYNTAX_SPECIFIED", V1, "syntax = \"proto2\";\npackage shootdown.v1;\n"),
    ("IMPORT_USED", V1, "import \"google/protobuf/any.proto\";\n"),
    ("IMPORT_NO_PUBLIC", V1, "import public \"google/protobuf/any.proto\";\n"),
    ("MESSAGE_PASCAL_CASE", V1, "// M.\nmessage a_thing {}\n"),
    ("FIELD_LOWER_SNAKE_CASE", V1, "// M.\nmessage A {\n  // F.\n  uint32 aField = 1;\n}\n"),
    (
        "ONEOF_LOWER_SNAKE_CASE",
        V1,
        "// M.\nmessage A {\n  // O.\n  oneof aB {\n    // F.\n    bool a = 1;\n  }\n}\n",
    ),
    ("ENUM_PASCAL_CASE", V1, "// E.\nenum an_enum {\n  // V.\n  AN_ENUM_UNSPECIFIED = 0;\n}\n"),
    ("ENUM_VALUE_UPPER_SNAKE_CASE", V1, "// E.\nenum E {\n  // V.\n  E_unspecified = 0;\n}\n"),
    ("ENUM_VALUE_PREFIX", V1, "// E.\nenum ErrorKind {\n  // V.\n  UNSPECIFIED = 0;\n}\n"),
    ("ENUM_ZERO_VALUE_SUFFIX", V1, "// E.\nenum E {\n  // V.\n  E_NONE = 0;\n}\n"),
    (
        "ENUM_NO_ALLOW_ALIAS",
        V1,
        "// E.\nenum E {\n  option allow_alias = true;\n  // V.\n  E_A = 0;\n  // V.\n  E_B = 0;\n}\n",
    ),
    ("SERVICE_PASCAL_CASE", V1, "// S.\nservice a_service {}\n"),
    ("SERVICE_SUFFIX", V1, "// S.\nservice Thing {}\n"),
    (
        "RPC_PASCAL_CASE",
        V1,
        "// M.\nmessage A {}\n// S.\nservice AService {\n  // R.\n  rpc get(A) returns (A);\n}\n",
    ),
    (
        "RPC_REQUEST_STANDARD_NAME",
        V1,
        "// M.\nmessage A {}\n// S.\nservice AService {\n  // R.\n  rpc Get(A) returns (A);\n}\n",
    ),
    (
        "RPC_RESPONSE_STANDARD_NAME",
        V1,
        "// M.\nmessage A {}\n// S.\nservice AService {\n  // R.\n  rpc Get(A) returns (A);\n}\n",
    ),
    (
        "RPC_REQUEST_RESPONSE_UNIQUE",
        V1,
        "// M.\nmessage A {}\n// S.\nservice AService {\n  // R.\n  rpc Get(A) returns (A);\n}\n",
    ),
    ("COMMENT_MESSAGE", V1, "message A {}\n"),
    ("COMMENT_FIELD", V1, "// M.\nmessage A {\n  bool a = 1;\n}\n"),
    ("COMMENT_FIELD", V1, "// M.\nmessage A {\n  // M.\n  message B {\n    bool a = 1;\n  }\n}\n"),
    ("COMMENT_ONEOF", V1, "// M.\nmessage A {\n  oneof a {\n    // F.\n    bool b = 1;\n  }\n}\n"),
    ("COMMENT_ENUM", V1, "enum E {\n  // V.\n  E_UNSPECIFIED = 0;\n}\n"),
    ("COMMENT_ENUM_VALUE", V1, "// E.\nenum E {\n  E_UNSPECIFIED = 0;\n}\n"),
    ("COMMENT_SERVICE", V1, "service AService {}\n"),
    ("COMMENT_RPC", V1, "// M.\nmessage A {}\n// S.\nservice AService {\n  rpc Get(A) returns (A);\n}\n"),
];

/// Every file of the package, whether build.rs names it or not.
fn files() -> Vec<String> {
    let entries = fs::read_dir("proto/shootdown/v1").unwrap();
    let mut files: Vec<_> =
        entries.map(|entry| format!("shootdown/v1/{}", entry.unwrap().file_name().display())).collect();
    files.sort();
    files
}

fn compile(own: impl FileResolver + 'static, names: &[String]) -> FileDescriptorSet {
    let mut resolver = ChainFileResolver::new();
    resolver.add(own);
    resolver.add(GoogleFileResolver::new());
    let mut compiler = protox::Compiler::with_file_resolver(resolver);
    compiler.include_source_info(true).include_imports(true).open_files(names).unwrap();
    compiler.file_descriptor_set()
}

struct Text {
    name: &'static str,
    source: String,
}

impl FileResolver for Text {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        if name == self.name {
            File::from_source(name, &self.source)
        } else {
            Err(protox::Error::file_not_found(name))
        }
    }
}

/// A rule and what breaks it.
type Violation = (&'static str, String);

fn violations(set: &FileDescriptorSet) -> Vec<Violation> {
    let mut check = Check::default();
    for file in set.file.iter().filter(|file| !file.name().starts_with("google/")) {
        check.file(file, set);
    }
    for (message, methods) in std::mem::take(&mut check.uses) {
        check.rule("RPC_REQUEST_RESPONSE_UNIQUE", methods.len() == 1, &format!("{message} in {methods:?}"));
    }
    check.found
}

#[derive(Default)]
struct Check {
    found: Vec<Violation>,
    /// Requests and responses, each with the methods that use it.
    uses: BTreeMap<String, Vec<String>>,
    /// Comments of the file that is looked at, by the path of what they stand above.
    comments: BTreeMap<Vec<i32>, String>,
}

/// The fields of descriptor.proto that a path is made of.
mod tag {
    pub(super) const FILE_MESSAGE: i32 = 4;
    pub(super) const FILE_ENUM: i32 = 5;
    pub(super) const FILE_SERVICE: i32 = 6;
    pub(super) const MESSAGE_FIELD: i32 = 2;
    pub(super) const MESSAGE_NESTED: i32 = 3;
    pub(super) const MESSAGE_ENUM: i32 = 4;
    pub(super) const MESSAGE_ONEOF: i32 = 8;
    pub(super) const ENUM_VALUE: i32 = 2;
    pub(super) const SERVICE_METHOD: i32 = 2;
}

fn below(path: &[i32], tag: i32, index: usize) -> Vec<i32> {
    [path, &[tag, i32::try_from(index).unwrap()]].concat()
}

impl Check {
    fn rule(&mut self, rule: &'static str, holds: bool, what: &str) {
        if !holds {
            self.found.push((rule, what.to_owned()));
        }
    }

    fn comment(&mut self, rule: &'static str, path: &[i32], what: &str) {
        let holds = self.comments.get(path).is_some_and(|text| !text.trim().is_empty());
        self.rule(rule, holds, what);
    }

    fn file(&mut self, file: &FileDescriptorProto, set: &FileDescriptorSet) {
        let (folder, name) = file.name().rsplit_once('/').unwrap_or(("", file.name()));
        let package = file.package();
        self.rule("SYNTAX_SPECIFIED", file.syntax() == "proto3", file.name());
        self.rule("PACKAGE_DEFINED", !package.is_empty(), file.name());
        self.rule("PACKAGE_DIRECTORY_MATCH", folder == package.replace('.', "/"), file.name());
        self.rule("PACKAGE_LOWER_SNAKE_CASE", package.split('.').all(is_lower_snake), package);
        let version = package.rsplit('.').next().and_then(|last| last.strip_prefix('v'));
        let version = version.and_then(|number| number.parse::<u32>().ok());
        self.rule("PACKAGE_VERSION_SUFFIX", version.is_some_and(|number| number >= 1), package);
        self.rule("FILE_LOWER_SNAKE_CASE", is_lower_snake(name.trim_end_matches(".proto")), file.name());
        self.imports(file, set);

        let places = file.source_code_info.iter().flat_map(|info| &info.location);
        self.comments =
            places.filter_map(|place| Some((place.path.clone(), place.leading_comments.clone()?))).collect();
        for (index, message) in file.message_type.iter().enumerate() {
            self.message(message, &below(&[], tag::FILE_MESSAGE, index), package);
        }
        for (index, of) in file.enum_type.iter().enumerate() {
            self.enumeration(of, &below(&[], tag::FILE_ENUM, index), package);
        }
        for (index, service) in file.service.iter().enumerate() {
            self.service(service, &below(&[], tag::FILE_SERVICE, index), package);
        }
    }

    fn imports(&mut self, file: &FileDescriptorProto, set: &FileDescriptorSet) {
        self.rule("IMPORT_NO_PUBLIC", file.public_dependency.is_empty(), file.name());
        let mut used = BTreeSet::new();
        file.message_type.iter().for_each(|message| types_of(message, &mut used));
        for method in file.service.iter().flat_map(|service| &service.method) {
            used.extend([method.input_type().to_owned(), method.output_type().to_owned()]);
        }
        for import in set.file.iter().filter(|other| file.dependency.iter().any(|name| name == other.name()))
        {
            let names = import.message_type.iter().map(DescriptorProto::name);
            let mut names = names.chain(import.enum_type.iter().map(EnumDescriptorProto::name));
            let is_used = names.any(|name| used.contains(&format!(".{}.{name}", import.package())));
            self.rule("IMPORT_USED", is_used, &format!("{} in {}", import.name(), file.name()));
        }
    }

    fn message(&mut self, message: &DescriptorProto, path: &[i32], parent: &str) {
        if message.options.as_ref().is_some_and(|options| options.map_entry()) {
            return; // Made by the compiler.
        }
        let name = format!("{parent}.{}", message.name());
        self.rule("MESSAGE_PASCAL_CASE", is_pascal(message.name()), &name);
        self.comment("COMMENT_MESSAGE", path, &name);
        let mut made = BTreeSet::new();
        for (index, field) in message.field.iter().enumerate() {
            let what = format!("{name}.{}", field.name());
            self.rule("FIELD_LOWER_SNAKE_CASE", is_lower_snake(field.name()), &what);
            self.comment("COMMENT_FIELD", &below(path, tag::MESSAGE_FIELD, index), &what);
            if field.proto3_optional() {
                made.extend(field.oneof_index); // By the compiler.
            }
        }
        for (index, oneof) in message.oneof_decl.iter().enumerate() {
            if !made.contains(&i32::try_from(index).unwrap()) {
                let what = format!("{name}.{}", oneof.name());
                self.rule("ONEOF_LOWER_SNAKE_CASE", is_lower_snake(oneof.name()), &what);
                self.comment("COMMENT_ONEOF", &below(path, tag::MESSAGE_ONEOF, index), &what);
            }
        }
        for (index, nested) in message.nested_type.iter().enumerate() {
            self.message(nested, &below(path, tag::MESSAGE_NESTED, index), &name);
        }
        for (index, of) in message.enum_type.iter().enumerate() {
            self.enumeration(of, &below(path, tag::MESSAGE_ENUM, index), &name);
        }
    }

    fn enumeration(&mut self, of: &EnumDescriptorProto, path: &[i32], parent: &str) {
        let name = format!("{parent}.{}", of.name());
        let alias = of.options.as_ref().is_some_and(|options| options.allow_alias());
        self.rule("ENUM_PASCAL_CASE", is_pascal(of.name()), &name);
        self.rule("ENUM_NO_ALLOW_ALIAS", !alias, &name);
        self.comment("COMMENT_ENUM", path, &name);
        let prefix = format!("{}_", upper_snake(of.name()));
        for (index, value) in of.value.iter().enumerate() {
            let what = format!("{name}.{}", value.name());
            self.rule("ENUM_VALUE_UPPER_SNAKE_CASE", is_upper_snake(value.name()), &what);
            self.rule("ENUM_VALUE_PREFIX", value.name().starts_with(&prefix), &what);
            self.comment("COMMENT_ENUM_VALUE", &below(path, tag::ENUM_VALUE, index), &what);
        }
        let zero = of.value.first().filter(|value| value.number() == 0);
        self.rule("ENUM_FIRST_VALUE_ZERO", zero.is_some(), &name);
        let unspecified = zero.is_some_and(|value| value.name().ends_with("_UNSPECIFIED"));
        self.rule("ENUM_ZERO_VALUE_SUFFIX", unspecified, &name);
    }

    fn service(&mut self, service: &ServiceDescriptorProto, path: &[i32], package: &str) {
        let name = format!("{package}.{}", service.name());
        self.rule("SERVICE_PASCAL_CASE", is_pascal(service.name()), &name);
        self.rule("SERVICE_SUFFIX", service.name().ends_with("Service"), &name);
        self.comment("COMMENT_SERVICE", path, &name);
        for (index, method) in service.method.iter().enumerate() {
            let what = format!("{name}.{}", method.name());
            self.rule("RPC_PASCAL_CASE", is_pascal(method.name()), &what);
            self.comment("COMMENT_RPC", &below(path, tag::SERVICE_METHOD, index), &what);
            let after_rpc = |message: &str, suffix: &str| {
                let short = message.rsplit('.').next().unwrap_or_default();
                let rpcs = [method.name().to_owned(), format!("{}{}", service.name(), method.name())];
                rpcs.iter().any(|rpc| short == format!("{rpc}{suffix}"))
            };
            self.rule("RPC_REQUEST_STANDARD_NAME", after_rpc(method.input_type(), "Request"), &what);
            self.rule("RPC_RESPONSE_STANDARD_NAME", after_rpc(method.output_type(), "Response"), &what);
            for message in [method.input_type(), method.output_type()] {
                self.uses.entry(message.to_owned()).or_default().push(what.clone());
            }
        }
    }
}

/// The full names of the types of a message's fields.
fn types_of(message: &DescriptorProto, used: &mut BTreeSet<String>) {
    used.extend(message.field.iter().map(|field| field.type_name().to_owned()));
    message.nested_type.iter().for_each(|nested| types_of(nested, used));
}

fn is_pascal(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_uppercase())
        && name.chars().all(|c| c.is_ascii_alphanumeric())
}

fn is_lower_snake(name: &str) -> bool {
    let word =
        |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    name.split('_').all(word) && name.starts_with(|first: char| first.is_ascii_lowercase())
}

fn is_upper_snake(name: &str) -> bool {
    is_lower_snake(&name.to_ascii_lowercase()) && name == name.to_ascii_uppercase()
}

/// `ErrorReason` as `ERROR_REASON`.
fn upper_snake(pascal: &str) -> String {
    let mut snake = String::new();
    for c in pascal.chars() {
        if c.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(c.to_ascii_uppercase());
    }
    snake
}
