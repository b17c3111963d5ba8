//! The public interface as a text, `public-api.txt`, so that each change of it is seen in a diff.
//!
//! A change that is meant is written down by `DSYNC_UPDATE=1 cargo test --test public_api`.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use syn::punctuated::Punctuated;
use syn::{Attribute, Fields, ImplItem, Item, ItemImpl, Meta, TraitItem, Type, UseTree, Visibility};

#[test]
fn the_public_interface_is_the_one_that_was_written_down() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let file = root.join("public-api.txt");
    let now = interface(&root.join("src"));
    if std::env::var_os("DSYNC_UPDATE").is_some() {
        fs::write(&file, &now).unwrap();
    }
    let known = fs::read_to_string(&file).unwrap_or_default();
    let missing: Vec<_> = known.lines().filter(|line| !now.lines().any(|other| other == *line)).collect();
    let added: Vec<_> = now.lines().filter(|line| !known.lines().any(|other| other == *line)).collect();
    assert!(
        known == now,
        "the public interface has changed: gone {missing:#?}, new {added:#?}. If that is meant, tell callers in CHANGELOG.md, and \
         run DSYNC_UPDATE=1 cargo test --test public_api"
    );
}

#[test]
fn what_threads_share_may_be_sent_and_shared() {
    fn is_shared<T: Send + Sync + ?Sized>() {}
    is_shared::<dyn dsync::Lock>();
    is_shared::<dyn dsync::SyncManager>();
    is_shared::<dsync::LockGuard>();
    is_shared::<dsync::MultiLock>();
    is_shared::<dsync::MultiGuard>();
    is_shared::<dsync::Leader>();
    is_shared::<dsync::Tenure>();
    is_shared::<dsync::Term>();
    is_shared::<dsync::Run<'_>>();
    is_shared::<dsync::Lost>();
    is_shared::<dsync::Context>();
    is_shared::<dsync::Canceller>();
    is_shared::<dsync::Config>();
    is_shared::<dsync::Error>();
    is_shared::<dsync::PostgresManager>();
    is_shared::<dsync::MemoryManager>();
    is_shared::<dsync::MemoryServer>();
    is_shared::<dsync::LockOptions>();
    is_shared::<dsync::TransactionLock>();
    is_shared::<dsync::SessionLock>();
    is_shared::<dsync::LockView>();
    is_shared::<dyn dsync::Observer>();
    is_shared::<dsync::Snapshot>();
}

/// All that `lib.rs` exports, and what its public modules have, each in the order of the names.
fn interface(sources: &Path) -> String {
    let library = parse(&sources.join("lib.rs"));
    let mut rooms = vec![(String::new(), BTreeSet::new())];
    for item in &library {
        if let Item::Use(item) = item
            && is_public(&item.vis)
        {
            leaves(&item.tree, &mut rooms[0].1);
        } else if let Item::Mod(item) = item
            && is_public(&item.vis)
        {
            let module = sources.join(format!("{}.rs", item.ident));
            let names: BTreeSet<_> = parse(&module).iter().filter_map(public_name).collect();
            // The guide has documentation alone.
            if !names.is_empty() {
                rooms.push((format!("// The module {}\n\n", item.ident), names));
            }
        }
    }
    let mut files = Vec::new();
    rust_files(sources, &mut files);
    files.sort();
    let mut items = Vec::new();
    files.iter().for_each(|file| items.extend(parse(file)));
    let mut text = String::new();
    for (heading, names) in rooms {
        text += &heading;
        for name in names {
            let mut found: Vec<String> = items.iter().filter_map(|item| shown(item, &name)).collect();
            if found.is_empty() {
                found.push(format!("pub use ::{name};\n"));
            }
            found.iter().for_each(|one| writeln!(text, "{}", one.trim_end()).unwrap());
            text.push('\n');
        }
    }
    text.trim_end().to_owned() + "\n"
}

/// The name of a public item of a module.
fn public_name(item: &Item) -> Option<String> {
    let (visibility, name) = match item {
        Item::Struct(item) => (&item.vis, &item.ident),
        Item::Enum(item) => (&item.vis, &item.ident),
        Item::Trait(item) => (&item.vis, &item.ident),
        Item::Fn(item) => (&item.vis, &item.sig.ident),
        Item::Const(item) => (&item.vis, &item.ident),
        Item::Type(item) => (&item.vis, &item.ident),
        _ => return None,
    };
    is_public(visibility).then(|| name.to_string())
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn parse(file: &Path) -> Vec<Item> {
    let text = expanded(&fs::read_to_string(file).unwrap());
    syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display())).items
}

/// A text in which the methods that all managers have stand where the macro `conveniences` of `src/manager.rs` puts them.
fn expanded(text: &str) -> String {
    let manager = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/manager.rs")).unwrap();
    let (_, rest) = manager.split_once("($($visibility:tt)?) => {").expect("the head of the macro");
    let (methods, _) = rest.split_once("\n    };\n}").expect("the end of the macro");
    let methods = |visibility| methods.replace("$($visibility)?", visibility);
    text.replace("conveniences!(pub);", &methods("pub")).replace("conveniences!();", &methods(""))
}

fn leaves(tree: &UseTree, names: &mut BTreeSet<String>) {
    match tree {
        UseTree::Path(path) => leaves(&path.tree, names),
        UseTree::Group(group) => group.items.iter().for_each(|tree| leaves(tree, names)),
        UseTree::Name(name) => drop(names.insert(name.ident.to_string())),
        UseTree::Rename(_) | UseTree::Glob(_) => panic!("lib.rs exports each thing by its own name"),
    }
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// The part of an item that callers of `name` see; `None` if it is another's, or a test's.
fn shown(item: &Item, name: &str) -> Option<String> {
    let item = match item.clone() {
        Item::Struct(mut item) if item.ident == name && is_public(&item.vis) => {
            keep(&mut item.attrs);
            match &mut item.fields {
                Fields::Named(fields) => fields.named = seen(&fields.named),
                Fields::Unnamed(fields) => fields.unnamed = seen(&fields.unnamed),
                Fields::Unit => {}
            }
            Item::Struct(item)
        }
        Item::Enum(mut item) if item.ident == name && is_public(&item.vis) => {
            keep(&mut item.attrs);
            for variant in &mut item.variants {
                keep(&mut variant.attrs);
                variant.fields.iter_mut().for_each(|field| keep(&mut field.attrs));
            }
            Item::Enum(item)
        }
        Item::Trait(mut item) if item.ident == name && is_public(&item.vis) => {
            keep(&mut item.attrs);
            for item in &mut item.items {
                if let TraitItem::Fn(method) = item {
                    keep(&mut method.attrs);
                    if let Some(body) = &mut method.default {
                        body.stmts.clear();
                    }
                }
            }
            Item::Trait(item)
        }
        Item::Fn(mut item) if item.sig.ident == name && is_public(&item.vis) => {
            keep(&mut item.attrs);
            item.block.stmts.clear();
            Item::Fn(item)
        }
        Item::Const(mut item) if item.ident == name && is_public(&item.vis) => {
            keep(&mut item.attrs);
            // Its value is the matter of other tests.
            *item.expr = syn::parse_str("..").unwrap();
            Item::Const(item)
        }
        Item::Type(mut item) if item.ident == name && is_public(&item.vis) => {
            keep(&mut item.attrs);
            Item::Type(item)
        }
        Item::Impl(item) if is_of(&item, name) => Item::Impl(implemented(item)?),
        _ => return None,
    };
    let file = syn::File { shebang: None, frontmatter: None, attrs: Vec::new(), items: vec![item] };
    Some(prettyplease::unparse(&file).replace(",\n    {}", ";").replace(" {}", ";"))
}

/// What is said of an item beside its documentation.
fn keep(attributes: &mut Vec<Attribute>) {
    let kept = ["cfg", "derive", "must_use", "non_exhaustive", "track_caller"];
    attributes.retain(|attribute| kept.iter().any(|name| attribute.path().is_ident(name)));
}

fn seen<P: Clone + Default>(fields: &Punctuated<syn::Field, P>) -> Punctuated<syn::Field, P> {
    let mut seen: Punctuated<syn::Field, P> =
        fields.iter().filter(|field| is_public(&field.vis)).cloned().collect();
    seen.iter_mut().for_each(|field| keep(&mut field.attrs));
    seen
}

/// True if it is an implementation for the type, or for its trait object.
fn is_of(item: &ItemImpl, name: &str) -> bool {
    let is_test = |attribute: &Attribute| matches!(&attribute.meta, Meta::List(list) if list.path.is_ident("cfg") && list.tokens.to_string() == "test");
    if item.attrs.iter().any(is_test) {
        return false;
    }
    match &*item.self_ty {
        Type::Path(path) => path.path.segments.last().is_some_and(|last| last.ident == name),
        Type::TraitObject(object) => object.bounds.iter().any(|bound| {
            matches!(bound, syn::TypeParamBound::Trait(bound) if bound.path.segments.last().is_some_and(|last| last.ident == name))
        }),
        _ => false,
    }
}

/// Of an implementation of a trait the first line, and of another one what is public.
fn implemented(mut item: ItemImpl) -> Option<ItemImpl> {
    keep(&mut item.attrs);
    if item.trait_.is_some() {
        item.items.retain(|item| matches!(item, ImplItem::Type(_)));
        return Some(item);
    }
    item.items.retain_mut(|item| match item {
        ImplItem::Fn(method) if is_public(&method.vis) => {
            keep(&mut method.attrs);
            method.block.stmts.clear();
            true
        }
        ImplItem::Const(constant) if is_public(&constant.vis) => {
            keep(&mut constant.attrs);
            true
        }
        _ => false,
    });
    (!item.items.is_empty()).then_some(item)
}
